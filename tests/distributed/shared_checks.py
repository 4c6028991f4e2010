"""Run by torchrun: layers and models that several processes share, beside the whole ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from quantization import PackedEmbedding, PackedLinearLayer, QWQALinearLayer, quantize_model
from quantization.distributed import ColwiseQuantized, RowwiseQuantized, plan_of, tensor_parallel
from quantization.layers.quantized_module import QuantizedModule
from tests.distributed.launch import run_checks

SCHEMES = ["rows", "w4g32a", "w3g33", "w8", "nf4g64", "w5g16af", "mxfp4", "ternaryg32", "kmeans3r"]
SCHEMES += ["w4g64a+dq", "w2t", "w8g32"]
WIDTH, HIDDEN = 96, 264
EPSILON = 2.0**-24
PLAN = {"up": ColwiseQuantized(), "down": RowwiseQuantized()}


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


class MLP(nn.Module):
    def __init__(self, scheme: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> None:
        super().__init__()
        up = nn.Linear(WIDTH, HIDDEN, bias=bias, dtype=dtype)
        down = nn.Linear(HIDDEN, WIDTH, bias=bias, dtype=dtype)
        if scheme == "rows":
            self.up, self.down = map(QWQALinearLayer.from_float, (up, down))
        else:
            self.up = PackedLinearLayer.from_float(up, scheme)
            self.down = PackedLinearLayer.from_float(down, scheme)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def unit_of(layer: nn.Module) -> int:
    from quantization.distributed.shares import group_of

    return group_of(layer)


def shared(whole: MLP) -> MLP:
    unit = unit_of(whole.down)
    plan = {"up": ColwiseQuantized(unit=unit), "down": RowwiseQuantized(unit=unit)}
    return tensor_parallel(copy.deepcopy(whole), mesh(), plan)


def allowed(whole: MLP, x: torch.Tensor) -> torch.Tensor:
    """Of the last layer, whose inputs have the same bits; 16-bit floats round it once more."""
    hidden, weight = whole.up(x).relu().double().abs(), whole.down.weight.double().abs()
    size = hidden @ weight.T
    if whole.down.bias is not None:
        size = size + whole.down.bias.double().abs()
    bound = 2 * (HIDDEN + dist.get_world_size() + 6) * EPSILON * size
    if x.dtype is torch.bfloat16:
        bound = bound + 2 * 2.0**-8 * whole(x).double().abs() + 2.0**-8 * size
    return bound + 1e-7


def check_sums_are_those_of_one_process() -> None:
    for scheme in SCHEMES:
        for dtype in (torch.float32, torch.bfloat16):
            for bias in (True, False):
                whole, x = MLP(scheme, dtype, bias), torch.randn(3, 2, WIDTH).to(dtype)
                y, wanted = shared(whole)(x), whole(x)
                assert y.dtype == dtype and y.shape == wanted.shape
                assert ((y - wanted).double().abs() <= allowed(whole, x)).all(), (scheme, dtype)
                gathered = [torch.empty_like(y) for _ in range(dist.get_world_size())]
                dist.all_gather(gathered, y.contiguous())
                assert all(torch.equal(y, other) for other in gathered)


def check_each_holds_its_part_of_the_bytes() -> None:
    count = dist.get_world_size()
    for scheme in ("rows", "w4g32a", "nf4g64", "w8"):
        whole = MLP(scheme, bias=False)
        whole.up = whole.up if scheme == "rows" else PackedLinearLayer(WIDTH, 256, scheme=scheme)
        if scheme != "rows":
            whole.down = PackedLinearLayer(256, WIDTH, scheme=scheme, bias=False)
        parts = shared(whole)
        kept = sum(t.numel() * t.element_size() for t in _codes(parts))
        stored = sum(t.untyped_storage().nbytes() for t in _codes(parts))
        assert kept == stored == sum(t.nbytes for t in _codes(whole)) // count
        assert parts.up.nbytes <= whole.up.nbytes / count + 64  # a codebook is nobody's part


def _codes(model: nn.Module) -> list[torch.Tensor]:
    names = ("int8_weights", "packed_weights")
    layers = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    return [t for layer in layers for name, t in layer._buffers.items() if name in names]


def check_joined_outputs_have_the_bits_of_one_process() -> None:
    for scheme in SCHEMES:
        for out in (37, 64):
            linear = nn.Linear(WIDTH, out)
            whole = PackedLinearLayer.from_float(linear, "w8" if scheme == "rows" else scheme)
            whole = QWQALinearLayer.from_float(linear) if scheme == "rows" else whole
            part = parallelize_module(
                copy.deepcopy(whole), mesh(), ColwiseQuantized(gather_output=True)
            )
            assert part.out_features in (
                out // dist.get_world_size(),
                out // dist.get_world_size() + 1,
            )
            for x in (torch.randn(WIDTH), torch.randn(3, WIDTH), torch.randn(2, 40, WIDTH)):
                assert torch.equal(part(x), whole(x)), scheme


def check_gradients_are_those_of_one_process() -> None:
    for scheme in ("rows", "w4g32a", "w3g33"):
        whole, x = MLP(scheme), torch.randn(5, WIDTH)
        for layer in (whole.up, whole.down):
            layer.bias = nn.Parameter(layer.bias.clone())
        parts = shared(whole)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        parts(mine).square().sum().backward()
        whole(theirs).square().sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
        rank, sizes = dist.get_rank(), [None] * dist.get_world_size()
        dist.all_gather_object(sizes, parts.up.out_features)
        start = sum(sizes[:rank])
        own = whole.up.bias.grad[start : start + sizes[rank]]
        torch.testing.assert_close(parts.up.bias.grad, own, rtol=1e-4, atol=1e-5)
        assert (parts.down.bias is None) == (rank != 0)
        if rank == 0:
            torch.testing.assert_close(parts.down.bias.grad, whole.down.bias.grad)
        joined = parallelize_module(
            copy.deepcopy(whole.up), mesh(), ColwiseQuantized(gather_output=True)
        )
        mine.grad = theirs.grad = None
        joined(mine).square().sum().backward()
        whole.up(theirs).square().sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def check_modes_of_torch() -> None:
    whole, x = MLP("w4g32a"), torch.randn(4, WIDTH)
    parts = shared(whole)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert ((parts(x) - whole(x)).double().abs() <= allowed(whole, x)).all()
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = parts(x), whole(x)
        assert y.dtype == wanted.dtype == torch.bfloat16
        torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)
    with torch.no_grad():
        again = copy.deepcopy(parts)
        assert torch.equal(again(x), parts(x))
    double = x.double()
    torch.testing.assert_close(parts(double), whole(double), rtol=1e-12, atol=1e-12)


def check_compile_takes_the_collectives_in() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.head = MLP("w4g32a"), PackedLinearLayer(WIDTH, 30, scheme="nf4")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.mlp(x) + x)

    whole, x = Joined(), torch.randn(4, WIDTH)
    plan = {"mlp.up": ColwiseQuantized(unit=32), "mlp.down": RowwiseQuantized(unit=32)}
    plan["head"] = ColwiseQuantized(gather_output=True)
    parts = tensor_parallel(copy.deepcopy(whole), mesh(), plan)
    compiled = torch.compile(parts, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), parts(x))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(mine).square().sum().backward()
    whole(theirs).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def check_embeddings_have_the_bits_of_one_process() -> None:
    for scheme in ("w8", "w4g32a", "nf4", "ternary"):
        for dtype in (torch.float32, torch.bfloat16):
            whole = PackedEmbedding(50, WIDTH, scheme=scheme, dtype=dtype)
            part = parallelize_module(copy.deepcopy(whole), mesh(), RowwiseQuantized())
            words = torch.randint(0, 50, (3, 7))
            assert torch.equal(part(words), whole(words))
            for wrong in (50, -1):
                try:
                    part(torch.tensor([1, wrong]))
                except IndexError:
                    continue
                raise AssertionError("a word that is not there was taken")


def check_float_layers_beside() -> None:
    whole, x = (
        nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 8)),
        torch.randn(3, WIDTH),
    )
    plan = {"0": ColwiseQuantized(), "2": RowwiseQuantized()}
    parts = tensor_parallel(copy.deepcopy(whole), mesh(), plan)
    assert parts[0].weight.shape == (64 // dist.get_world_size(), WIDTH)
    torch.testing.assert_close(parts(x), whole(x))


def check_nothing_is_changed_by_a_plan_that_fails() -> None:
    count = dist.get_world_size()
    model = nn.Sequential(PackedLinearLayer(WIDTH, 64), nn.ReLU(), PackedLinearLayer(64, 1))
    before = copy.deepcopy(model.state_dict())
    bad: list[tuple[dict, type, str]] = [
        ({"0": ColwiseQuantized(), "2": ColwiseQuantized()}, ValueError, "1 features cannot be"),
        ({"0": ColwiseQuantized(), "1": ColwiseQuantized()}, TypeError, "ReLU has no shares"),
        ({"0": ColwiseQuantized(), "3": ColwiseQuantized()}, ValueError, "matches no module"),
        ({"0": "colwise"}, TypeError, "expected a ParallelStyle"),
    ]
    for plan, kind, message in bad:
        try:
            tensor_parallel(model, mesh(), plan)
        except kind as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"{plan} was taken by {count} processes")
        after = model.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert not model[0]._forward_pre_hooks


# ---- a language model ------------------------------------------------------------------------


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 97}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes | heads | options, num_hidden_layers=2, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def _compare(whole: nn.Module) -> nn.Module:
    words = torch.randint(0, 97, (2, 9))
    parts = tensor_parallel(copy.deepcopy(whole))
    with torch.no_grad():
        torch.testing.assert_close(parts(words).logits, whole(words).logits, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(parts.generate(words, **options), whole.generate(words, **options))
    return parts


def check_a_llama_with_whole_heads() -> None:
    whole = llama()
    quantize_model(whole, {"lm_head": "w8", nn.Embedding: "w8", "*": "w4g32a"})
    parts, count = _compare(whole), dist.get_world_size()
    attention = parts.model.layers[0].self_attn
    assert attention.q_proj.out_features == 128 // count
    assert attention.o_proj.in_features == 128 // count
    assert parts.lm_head.packed_weights is parts.model.embed_tokens.packed_weights


def check_a_llama_whose_heads_do_not_divide() -> None:
    whole = llama(num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    quantize_model(whole, {"lm_head": None, "*": "w4g32a"})
    plan = plan_of(whole, dist.get_world_size())
    assert plan["model.layers.0.self_attn.q_proj"].gather_output
    assert isinstance(plan["model.layers.0.mlp.down_proj"], RowwiseQuantized)
    _compare(whole)


def check_a_llama_with_layers_left_in_float() -> None:
    whole = llama()
    quantize_model(whole, {"q_proj": None, "down_proj": None, "lm_head": None, "*": "w4g32a"})
    parts = _compare(whole)
    attention = parts.model.layers[0].self_attn
    assert type(attention.q_proj) is nn.Linear
    assert attention.q_proj.out_features == 128 // dist.get_world_size()


def check_norms_of_heads_have_the_gradient_of_one_process() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 97, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    whole = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))
    quantize_model(whole, {"lm_head": None, "*": "w4g16"})
    parts, words = tensor_parallel(copy.deepcopy(whole)), torch.randint(0, 97, (2, 9))
    for model in (whole, parts):
        model(words).logits.square().mean().backward()
    for name in ("q_norm", "k_norm"):
        for mine, theirs in zip(parts.model.layers, whole.model.layers, strict=True):
            mine, theirs = (getattr(layer.self_attn, name).weight for layer in (mine, theirs))
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    embeddings = (model.model.embed_tokens.weight.grad for model in (parts, whole))
    torch.testing.assert_close(*embeddings, rtol=1e-3, atol=1e-6)


CHECKS = {
    name.removeprefix("check_"): f for name, f in globals().items() if name.startswith("check_")
}

if __name__ == "__main__":
    run_checks(CHECKS)
