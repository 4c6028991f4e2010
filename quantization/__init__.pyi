"""The public names and where they come from: read by type checkers, and by the package itself."""

from quantization.calibration.budget import plan_bits as plan_bits
from quantization.calibration.calibrate import calibrate as calibrate
from quantization.calibration.evaluate import (
    Divergence as Divergence,
    Perplexity as Perplexity,
    divergence as divergence,
    perplexity as perplexity,
)
from quantization.calibration.files import (
    load_statistics as load_statistics,
    save_statistics as save_statistics,
)
from quantization.calibration.plans import (
    BitPlan as BitPlan,
    PlannedLayer as PlannedLayer,
)
from quantization.checkpoint import (
    load_quantized as load_quantized,
    quantize_checkpoint as quantize_checkpoint,
    save_quantized as save_quantized,
)
from quantization.inspection.checking.self_test import self_test as self_test
from quantization.inspection.checking.verify import verify as verify
from quantization.inspection.comparison.compare import (
    Comparison as Comparison,
    compare as compare,
)
from quantization.inspection.comparison.damage import LayerDamage as LayerDamage
from quantization.inspection.comparison.keep import Kept as Kept
from quantization.inspection.explain import (
    Explanation as Explanation,
    explain as explain,
)
from quantization.inspection.explain_byte import (
    ByteExplanation as ByteExplanation,
    explain_byte as explain_byte,
)
from quantization.inspection.footprint import footprint as footprint
from quantization.inspection.plots import (
    plot_errors as plot_errors,
    plot_frontier as plot_frontier,
    plot_layers as plot_layers,
    plot_roofline as plot_roofline,
    plot_weights as plot_weights,
    roofline_panels as roofline_panels,
)
from quantization.inspection.report import (
    LayerReport as LayerReport,
    report as report,
)
from quantization.layers.arena import lay_out as lay_out, pages_of as pages_of
from quantization.layers.float_layers import PLAIN_LINEAR as PLAIN_LINEAR
from quantization.layers.packed_embedding import PackedEmbedding as PackedEmbedding
from quantization.layers.packed_layer import PackedLinearLayer as PackedLinearLayer
from quantization.linear_layer import (
    QWQALinearLayer as QWQALinearLayer,
    name_for_quantized_weight_buffer as name_for_quantized_weight_buffer,
)
from quantization.linear_quantizer import (
    PER_COLUMNS as PER_COLUMNS,
    PER_ROWS as PER_ROWS,
    Granularity as Granularity,
    Mode as Mode,
    QuantizationParameters as QuantizationParameters,
    dequantize_linear as dequantize_linear,
    get_info as get_info,
    get_scale_and_zero_for as get_scale_and_zero_for,
    group as group,
    per_dim_scale_and_zero_for as per_dim_scale_and_zero_for,
    quantize_linear as quantize_linear,
)
from quantization.methods.registry import (
    fit_matrix as fit_matrix,
    method_names as method_names,
    register_method as register_method,
)
from quantization.methods.statistics import (
    ModelStatistics as ModelStatistics,
    Statistics as Statistics,
)
from quantization.models.plan import (
    ModelPlan as ModelPlan,
    plan as plan,
)
from quantization.models.quantizer import (
    dequantize_model as dequantize_model,
    quantize_model as quantize_model,
)
from quantization.models.recipe import Rule as Rule
from quantization.ops.linear import quantized_forward as quantized_forward
from quantization.ops.runtime import (
    active_isa as active_isa,
    get_num_threads as get_num_threads,
    isas as isas,
    set_isa as set_isa,
    set_num_threads as set_num_threads,
)
from quantization.schemes.codebooks import register_grid as register_grid
from quantization.schemes.kernel_choice import (
    LinearKernel as LinearKernel,
    linear_kernel as linear_kernel,
)
from quantization.schemes.packed_weights import (
    PackedWeights as PackedWeights,
    pack_matrix as pack_matrix,
)
from quantization.schemes.scheme import Scheme as Scheme
from quantization.swap.experts import (
    UnfusedExperts as UnfusedExperts,
    unfuse_experts as unfuse_experts,
)
from quantization.swap.replacement import (
    ReplacementReport as ReplacementReport,
    Target as Target,
    replace_linear_layers_with_w8a16 as replace_linear_layers_with_w8a16,
    target_class_from as target_class_from,
)
from quantization.weight_pack import (
    Packing as Packing,
    bit_shifts as bit_shifts,
    get_dtype_size_in_bits as get_dtype_size_in_bits,
    get_max_bits_needed as get_max_bits_needed,
    pack_weights as pack_weights,
    unpack_weights as unpack_weights,
)

__version__: str
