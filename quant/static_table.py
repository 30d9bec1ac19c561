"""The table of a static activation scale: a range of the input for every bin of diffusion times.

Guarantees: low <= 0 <= high; every time from 0 to the last has a bin.
Knows nothing of: how a range is chosen (ranges.py) and how the table is read at run time (linear.py).
"""

from torch import Tensor

from bitdgdm.quant.activations import split_outliers
from bitdgdm.quant.inputs import Inputs
from bitdgdm.quant.ranges import equal_bins, learned_bins, range_of_bins, smooth_range, static_range
from bitdgdm.quant.recipe import Recipe


def static_table(seen: Inputs, layer: int, recipe: Recipe) -> dict[str, Tensor]:
    """act_low, act_high and bin_of_t of LinearParts. seen: what D meets, without the channels of a column block."""
    inliers, _ = split_outliers(seen.samples[layer], recipe, None)
    x, time, steps = inliers.cpu(), seen.times[layer].cpu(), seen.diffusion_steps
    bits, asymmetric = recipe.act_bits, recipe.act_asymmetric
    if recipe.act_groups == "smooth":
        low, high = smooth_range(x, time, bits, asymmetric, steps)
        bin_of_t = equal_bins(steps, steps)
    elif recipe.act_groups == "learned":
        bin_of_t = learned_bins(x, time, bits, asymmetric, recipe.act_bins, steps)
        bins = int(bin_of_t.max()) + 1
        low, high = range_of_bins(x, bin_of_t[time].long(), bins, bits, asymmetric, recipe.act_range)
    else:
        low, high = static_range(x, time, bits, asymmetric, recipe.act_bins, steps, recipe.act_range)
        bin_of_t = equal_bins(recipe.act_bins, steps)
    return {"act_low": low.float(), "act_high": high.float(), "bin_of_t": bin_of_t}
