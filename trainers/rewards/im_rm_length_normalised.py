"""A remedy for IM-RM: r = β/|y| [ln π(y|x) − ln π_ref(y|x)], the mean over the response's tokens instead of the sum.

Length-normalised DPO (Lambert et al., 2024, Tülu 3); without the reference it is SimPO's reward (Meng et al., 2024).
A mean is some hundred times smaller than the sum, so β should be larger than IM-RM's.
"""

from trainers.rewards.im_rm import log_ratios, scaled

REWARD_TYPE = scaled(
    "im_rm_length_normalised",
    lambda model, batch, spec: log_ratios(model, batch, spec) / batch.owner_M.bincount(),
    "r = β/|y| [ln π(y|x) − ln π_ref(y|x)]",
)
