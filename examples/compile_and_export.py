"""One graph of a quantized model, with any batch: compiled, timed beside eager, exported, loaded.

python examples/compile_and_export.py
"""

import io
import timeit

import torch
from torch import nn

from quantization import quantize_model

WIDTH, TOKENS = 256, 8


class Block(nn.Module):
    """What a transformer does between two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what the gated layers make of ``x``."""
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def best(call, x: torch.Tensor) -> float:
    """Milliseconds of the fastest of 30 calls."""
    return 1e3 * min(timeit.repeat(lambda: call(x), number=1, repeat=30))


torch.manual_seed(0)
model = nn.Sequential(*(Block() for _ in range(6))).eval()
quantize_model(model, "w4g64a")
x = torch.randn(TOKENS, WIDTH)

told = torch._dynamo.explain(model)(x)
print(f"graphs: {told.graph_count}, graph breaks: {told.graph_break_count}")

compiled = torch.compile(model, fullgraph=True, dynamic=True)
with torch.no_grad():
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    print(f"{TOKENS} tokens: eager {best(model, x):.2f} ms, compiled {best(compiled, x):.2f} ms")

batch = torch.export.Dim("batch", min=1)
program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
file = io.BytesIO()
torch.export.save(program, file)
print(f"exported: {len(file.getvalue()):,} bytes")
file.seek(0)
loaded, other = torch.export.load(file).module(), torch.randn(3, WIDTH)
print("the loaded program gives the same bits:", torch.equal(loaded(other), model(other)))
