"""The systems that the method is compared with, each as a recipe of the same QuantLinear.

Guarantees: each entry says how it was adapted to a Linear of a graph diffusion network, what it needs beforehand, what
it adds at run time, and where it is from. Inputs for calibration are the sampler's own trajectories.
Knows nothing of: how a recipe is carried out, and how good it is (benchmarks/results says that).
"""

from bitdgdm.quant.recipe import Recipe

NO_DATA = "no calibration"
SEEN = "self-sampled inputs"

TIME_PATH = ("*.y_*", "*.y_out.*", "*.lin_y*", "*.x_y.*", "*.e_y.*")
"""Linears through which the diffusion time reaches nodes and edges."""

AFTER_RELU = ("*.linX2", "*.linE2", "*.lin_y2")
"""Linears whose inputs are never negative."""


def _rtn(weight_bits: int, act_bits: int) -> Recipe:
    return Recipe(
        f"rtn-w{weight_bits}a{act_bits}", weight_bits, act_bits,
        summary=f"round to nearest, {weight_bits}-bit weights per output channel, {act_bits}-bit activations per token",
        source="absmax rounding", cost=f"{NO_DATA}; nothing beside the low-bit product",
    )  # fmt: skip


def _gptq(weight_bits: int, act_bits: int) -> Recipe:
    return Recipe(
        f"gptq-w{weight_bits}a{act_bits}", weight_bits, act_bits, weight_clip="mse", rounding="gptq",
        calibration="uniform",
        summary=f"{weight_bits}-bit weights rounded one input after the other, each making up for the errors before it",
        source="Frantar et al., GPTQ, ICLR 2023; scales by a clip search, activations per token",
        cost=f"second moments of {SEEN}; nothing beside the low-bit product",
    )  # fmt: skip


def _smoothquant(weight_bits: int, act_bits: int) -> Recipe:
    return Recipe(
        f"smoothquant-w{weight_bits}a{act_bits}", weight_bits, act_bits, premul="smooth", calibration="uniform",
        summary="outlying input channels scaled down and their weights up, then round to nearest",
        source="Xiao et al., SmoothQuant, ICML 2023; the scale is applied at run time because e_out and x_out have "
        "no LayerNorm that could hold it",
        cost=f"largest values of {SEEN}; one multiplication per input",
    )  # fmt: skip


def _svdquant(rank: int) -> Recipe:
    return Recipe(
        f"svdquant-w4a4-r{rank}", 4, 4, rank=rank, solver="svd", premul="smooth", weight_group=64, weight_clip="mse",
        act_scale="group", calibration="uniform", version=2,
        summary=f"smoothed inputs, rank {rank} in 16 bit, 4-bit remainder and inputs in groups of 64",
        source="Li et al., SVDQuant, ICLR 2025; one smoothing strength for all layers",
        cost=f"largest values of {SEEN}; a rank-{rank} product in 16 bit and one multiplication per input",
    )  # fmt: skip


RIVALS = (
    _rtn(8, 8),
    _rtn(6, 6),
    _rtn(4, 8),
    _rtn(4, 4),
    _rtn(3, 8),
    Recipe(
        "fp8-w8a8", 8, 8, weight_format="fp8", act_format="fp8",
        summary="e4m3 weights per output channel, e4m3 activations per token",
        source="Micikevicius et al., FP8 formats, arXiv:2209.05433",
        cost=f"{NO_DATA}; the largest value of each token",
    ),
    Recipe(
        "fp8-one-w8a8", 8, 8, weight_format="fp8", act_format="fp8", act_scale="one",
        summary="e4m3 weights per output channel, activations cast to e4m3 as they are, saturating at 448",
        source="Micikevicius et al., FP8 formats, arXiv:2209.05433, without a scale for activations",
        cost=f"{NO_DATA}; nothing beside the fp8 product",
    ),
    Recipe(
        "llm-int8-w8a8", 8, 8, columns=8, calibration="uniform",
        summary="the 8 input channels with the largest activations in 16 bit, the rest in 8 bit",
        source="Dettmers et al., LLM.int8(), NeurIPS 2022; a fixed number of channels in the place of a threshold of 6",
        cost=f"largest values of {SEEN}; a 16-bit product of 8 channels",
    ),
    _smoothquant(8, 8),
    _smoothquant(4, 4),
    _gptq(4, 8),
    _gptq(4, 4),
    _gptq(3, 8),
    _svdquant(16),
    _svdquant(32),
    Recipe(
        "squeezellm-w4a16", 4, 16, weight_format="codebook", alpha=0.0045, sparse_choice="sensitivity",
        calibration="uniform",
        summary="16 values per output channel by weighted k-means, the most sensitive 0.45 % of the weights apart",
        source="Kim et al., SqueezeLLM, ICML 2024; a weight counts by the mean square of its input in the place of the "
        "squared gradient",
        cost=f"second moments of {SEEN}; weight only, so no faster product; a book of 256 bits a row",
    ),
    Recipe(
        "pb-llm-w1a16", 1, 16, weight_format="binary", alpha=0.1, sparse_choice="salient", calibration="uniform",
        summary="weights of one bit per row scale, up to 10 % salient ones in 16 bit",
        source="Shang et al., PB-LLM, ICLR 2024; a bound per row and column, and 16 bit for salient weights",
        cost=f"second moments of {SEEN}; weight only; a sparse product",
    ),
    Recipe(
        "quarot-w4a4", 4, 4, premul="hadamard", rounding="gptq", weight_clip="mse", calibration="uniform",
        summary="inputs turned by a Hadamard transform, weights in 4 bit by GPTQ, activations in 4 bit per token",
        source="Ashkboos et al., QuaRot, NeurIPS 2024; every transform is online, because LayerNorm gains and "
        "elementwise products keep it from being folded into the weights",
        cost=f"second moments of {SEEN}; width * log2(width) additions per input row",
    ),
    Recipe(
        "duquant-w4a4", 4, 4, premul="duquant", act_asymmetric=True, calibration="uniform",
        summary="inputs permuted and turned in blocks of 16 so that no channel stands out, then round to nearest",
        source="Lin et al., DuQuant, NeurIPS 2024; rotations per block, chosen by the mean squared peak of a token",
        cost=f"{SEEN}; 32 multiplications per input at run time",
    ),
    Recipe(
        "q-diffusion-w4a8", 4, 8, rounding="adaround", weight_clip="mse", act_scale="static", act_range="mse",
        act_asymmetric=True, calibration="uniform",
        summary="weights rounded by AdaRound, one static range for the activations, calibrated evenly over time",
        source="Li et al., Q-Diffusion, ICCV 2023; a layer is rebuilt by itself; DiGress has no shortcut to split",
        cost=f"{SEEN}; nothing at run time, not even the largest value of a token",
    ),
    Recipe(
        "ptq4dm-w8a8", 8, 8, weight_clip="mse", act_scale="static", act_range="mse", act_asymmetric=True,
        calibration="skewed",
        summary="static ranges with the least squared error, calibrated at times from a skewed normal distribution",
        source="Shang et al., PTQ4DM, CVPR 2023",
        cost=f"{SEEN}, times near the molecule more often; nothing at run time",
    ),
    Recipe(
        "tdq-w4a8", 4, 8, weight_clip="mse", act_scale="static", act_groups="smooth", act_asymmetric=True,
        calibration="uniform",
        summary="a range for every diffusion time, from a small network of the time",
        source="So et al., Temporal Dynamic Quantization, NeurIPS 2023; trained on the layer's own rounding error",
        cost=f"{SEEN}; a table of two numbers per time and layer",
    ),
    Recipe(
        "apq-dm-w6a6", 6, 6, weight_clip="mse", act_scale="static", act_groups="learned", act_bins=8, act_range="mse",
        act_asymmetric=True, calibration="uniform",
        summary="8 groups of times, found by their rounding error, with a static range each",
        source="Wang et al., APQ-DM, CVPR 2024; groups are intervals and found exactly; weights by a clip search",
        cost=f"{SEEN}; a table of 8 ranges a layer",
    ),
    Recipe(
        "qvd-w4a4", 4, 4, weight_clip="mse", premul="smooth", act_asymmetric=True, calibration="uniform",
        overrides=tuple((pattern, (("weight_bits", 8), ("act_bits", 8))) for pattern in TIME_PATH),
        summary="channels smoothed, and 8 bit for the path through which the time reaches nodes and edges",
        source="Tian et al., QVD, ACM MM 2024; time enters DiGress through y alone, so its path keeps it discernible",
        cost=f"largest values of {SEEN}; one multiplication per input, 8-bit products on the path of the time",
    ),
    Recipe(
        "ptq4sam-w4a4", 4, 4, weight_clip="mse", rounding="adaround", act_asymmetric=True, calibration="uniform",
        overrides=tuple((pattern, (("act_format", "log"), ("act_asymmetric", False))) for pattern in AFTER_RELU),
        summary="a log grid where inputs are never negative, weights rounded by AdaRound",
        source="Lv et al., PTQ4SAM, CVPR 2024; its log grid is for softmax outputs, which no Linear of DiGress reads, so "
        "inputs behind a ReLU have it; no input has the two humps that it merges",
        cost=f"second moments of {SEEN}; shifts in the place of the integer product there",
    ),
    Recipe(
        "lora-repair-w4a4", 4, 4, weight_clip="mse", factor_bits=8, act_asymmetric=True, repair_steps=100, repair_rank=4,
        calibration="uniform",
        summary="round to nearest, then factors of rank 4 beside every layer and its bias, learned in 100 steps of distillation",
        source="Hu et al., LoRA, ICLR 2022, and Guo et al., LQ-LoRA, ICLR 2024; learned against the full-precision "
        "network on molecules that it drew itself",
        cost=f"100 steps of training on {SEEN}; a rank-4 product in 16 bit",
    ),
)  # fmt: skip
