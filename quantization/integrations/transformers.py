"""transformers: models that are quantized while they load, saved, and loaded without arguments.

Importing this module registers the config and the quantizer::

    import quantization.integrations.transformers
    from quantization.integrations.transformers import QuantizationConfig

    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=QuantizationConfig("w4g64a")
    )
    model.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)  # needs the import, and nothing else

The layers are those that :func:`quantization.quantize_model` makes of the float model, bit for bit,
but a float weight lives only until its layer is made. A layer whose weight the checkpoint lacks,
such as a head for a new task, stays in float, to be trained. Models that were quantized by hand are
saved in the same form. Where this module was not imported, transformers refuses what is saved here:
an empty tensor stands under the name of each float weight, and its shape does not fit.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from quantization.ops.extras import need

need("transformers", "transformers", "5.22")

from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from quantization.checkpoint.plain_config import METHODS
from quantization.integrations.transformers_config import QuantizationConfig
from quantization.integrations.transformers_init import keeping_codes
from quantization.integrations.transformers_stored import (
    StoredWeights,
    state_dict_of,
)
from quantization.integrations.transformers_ties import restrict_ties
from quantization.integrations.transformers_weights import FloatWeights
from quantization.layers.arena import lay_out
from quantization.layers.quantized_module import QuantizedModule
from quantization.models.quantizer import dequantize_model, form_of
from quantization.swap.report import ReplacementReport

__all__ = ["QuantizationConfig", "Quantizer", "note_swap"]


class Quantizer(HfQuantizer):
    """What transformers asks while it loads and saves; users see ``model.hf_quantizer.report``.

    Attributes:
        report: what became of each layer on loading; None where nothing is quantized.
    """

    requires_calibration = False

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)  # it takes notes there
        self.report: ReplacementReport | None = None
        self._weights: FloatWeights | StoredWeights | None = None

    # ---- before the weights ------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work, before anything is read.

        Raises:
            ValueError: if a float model is to be offloaded to the disk while it is quantized.
        """
        device_map = kwargs.get("device_map")
        places = device_map.values() if isinstance(device_map, dict) else ()
        if not self.pre_quantized and "disk" in places:
            raise ValueError(
                "a model cannot be quantized and offloaded to the disk at once: load it without "
                "'disk' in the device_map, save it, and load what was saved with 'disk'"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if self.pre_quantized:
            self._weights = StoredWeights(model, config)
        else:
            self._weights = FloatWeights(model, config, model.config.dtype)
        self.report = self._weights.report
        return model

    # ---- each weight -------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a float weight of the checkpoint is to become codes."""
        return isinstance(self._weights, FloatWeights) and param_name in self._weights

    def get_quantize_ops(self) -> Any:
        """What makes codes of it."""
        return self._weights.operation()

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes of a number in memory, for the device map."""
        if self.param_needs_quantization(model, param_name):
            return self._weights.bytes_per_number(param_name)
        return param.element_size()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> Any:
        """The dtype to cast a stored tensor to; one that does not fit its layer is refused.

        Raises:
            ValueError, TypeError: for another shape, or floats in the place of codes.
        """
        if isinstance(self._weights, StoredWeights) and not getattr(converter, "operations", ()):
            dtype = self._weights.checked_dtype(converter.target_patterns[0], param, dtype)
        return super().get_new_dtype(converter, param, dtype)

    # ---- after the weights -------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        weights, self._weights = self._weights, None
        report = weights.finish(model)
        if report is not None:
            self.report = report
        restrict_ties(model)
        lay_out(model)
        self.quantization_config.describe(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict]:
        """What is saved; the config takes down which layers the model has by now."""
        model.config.quantization_config = self.quantization_config.describe(model)
        return state_dict_of(model, self.quantization_config), {}

    def dequantize(self, model: Any, dtype: Any = None) -> Any:
        """A float model of the numbers that the codes stand for, of ``dtype`` if one is given."""
        dequantize_model(model)
        self.remove_quantization_config(model)
        if dtype is not None:
            model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works: yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on top can be trained: yes."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model: yes."""
        return True


# ---- models that were quantized by hand ------------------------------------------------------


def note_swap(model: torch.nn.Module) -> None:
    """Take note of a swap of layers: transformers must not tie what is codes now.

    Example:
        >>> from quantization import quantize_model
        >>> note_swap(quantize_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), "w4").model)
    """
    restrict_ties(model)


@contextmanager
def _described(model: Any, *_: Any, **__: Any) -> Iterator[None]:
    """For the time of saving, what a model that ``from_pretrained`` quantized has.

    Raises:
        ValueError: if another quantizer is to save layers of its own beside those of this package.
    """
    other = getattr(model, "hf_quantizer", None)
    is_quantized = any(isinstance(module, QuantizedModule) for module in model.modules())
    if not is_quantized or isinstance(other, Quantizer):
        yield
        return
    if other is not None and other.is_serializable():
        raise ValueError(
            f"the model has layers of {other.quantization_config.quant_method} beside those of "
            "quantization: they cannot be saved together"
        )
    restrict_ties(model)
    old = model.config.__dict__.get("quantization_config")
    model.hf_quantizer = Quantizer(QuantizationConfig.of(model))
    try:
        yield
    finally:
        del model.hf_quantizer
        model.config.__dict__.pop("quantization_config", None)
        if other is not None:
            model.hf_quantizer = other
        if old is not None:
            model.config.quantization_config = old


@contextmanager
def _resizable(model: Any, *sizes: Any, **named_sizes: Any) -> Iterator[None]:
    """Refuse to resize tables that are codes: transformers would write to what they stand for."""
    is_asked = any(size is not None for size in (*sizes[:2], *named_sizes.values()))
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        if is_asked and isinstance(table, QuantizedModule):
            raise ValueError(
                f"the {type(table).__name__} of scheme {form_of(table)} cannot be resized: resize "
                "the float model and quantize it then, or make this one float by dequantize_model"
            )
    yield


def _within(context: Callable[..., AbstractContextManager[None]], original: Any) -> Any:
    """A method that runs within a context of its model and arguments."""

    @functools.wraps(original)
    def method(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        with context(self, *args, **kwargs):
            return original(self, *args, **kwargs)

    method.knows_quantized = True  # type: ignore[attr-defined]
    return method


def _register() -> None:
    for method in METHODS:
        for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
            if getattr(mapping.get(method), "__module__", "").startswith("quantization."):
                del mapping[method]  # what waited for this module, or itself before a reload
        register_quantization_config(method)(QuantizationConfig)
        register_quantizer(method)(Quantizer)
    contexts = {
        "save_pretrained": _described,
        "resize_token_embeddings": _resizable,
        "initialize_weights": keeping_codes,
    }
    for name, context in contexts.items():
        method = getattr(PreTrainedModel, name)
        if not hasattr(method, "knows_quantized"):
            setattr(PreTrainedModel, name, _within(context, method))


_register()
