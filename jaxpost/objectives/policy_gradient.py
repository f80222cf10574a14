"""Policy-gradient objectives: make sampled tokens likelier by how much better than expected they turned out.

    grad = sum over tokens of  stable_mask * advantage / reference_policy * d policy

Each method below is a choice of four parts and of what is added to them; numbers in brackets are the settings, in the order in
which the part takes them. `jaxpost.rollouts.advantages` has the advantages, `surrogates` the ratios and their stabilisation,
`estimator` the aggregations and `terms` the rest.

    method         advantages             surrogate                 aggregation       terms
    -------------  ---------------------  ------------------------  ----------------  ---------------------------------
    reinforce      leave_one_out          reinforce                 sequence_sum      -
    rloo           leave_one_out(0.05)    sequence_clip(0.2, 0.2)   sequence_sum      -
    grpo           group                  clip(0.2, 0.2)            sequence_mean     k3_in_loss(0.04)
    dr_grpo        centred                clip(0.2, 0.2)            constant(3000)    -
    dapo           group                  clip(0.2, 0.28)           token_mean        -
    gspo           group                  gspo(0.0003, 0.0004)      sequence_mean     -
    cispo          group                  cispo(5.0)                token_mean        -
    sapo           group                  sapo(1.0, 1.05)           sequence_mean     -
    gmpo           group                  gmpo(0.4, 0.4)            sequence_mean     -
    reinforce_pp   reinforce_pp(0.01)     clip(0.2, 0.2)            token_mean        -
    ppo            gae(1.0, 0.95, 0.05)   clip(0.2, 0.2)            token_mean        value(0.1, 0.2)
    trl            group(0.0001, 1)       clip(0.2, 0.2)            token_mean        kl_k3_ratio(0.0)
    verl           group(1e-06, 1)        clip(0.2, 0.2, 3.0)       token_mean        k3_in_loss(0.0) + entropy(0.0)
    tulu           centred                clip(0.2, 0.2)            token_mean        k3_in_loss(0.01)

The last three are the defaults of other frameworks. A coefficient of 0 leaves the term out, and nothing is computed for it.
`variant` exchanges parts of any of them:

    objective={"name": "policy_gradient.dapo"}
    objective={"name": "policy_gradient.variant", "of": "policy_gradient.dapo", "weightings": {"top_entropy": {"share": 0.2}}}

All read tokens, segments, mask, advantages and old_logps [B,S] and the scalar temperature, at which the policy is scored; those
with a term of the KL read ref_logps too. Log-probabilities are in nats. The advantages named are what the rollouts use unless
`rollouts.advantages` says otherwise. TRL.md maps TRL's names to these.
"""

from collections.abc import Mapping
from functools import partial

from jaxpost.objectives import surrogates, terms
from jaxpost.objectives.estimator import (
    TABLES,
    Parts,
    added,
    constant,
    estimator,
    inside,
    part,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from jaxpost.objectives.logprobs import REFERENCE


@estimator
def reinforce():
    """The plain policy gradient:  L = -mean_i A_i sum_t log p_it.

    With the leave-one-out advantage its expectation is the exact gradient of the expected return. No ratio and no clipping: it
    is for one step a batch. Source: "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
    Learning"; the baseline from "Buy 4 REINFORCE Samples, Get a Baseline for Free!".
    """
    return Parts("leave_one_out", surrogates.reinforce, sequence_sum)


@estimator
def rloo(*, low: float = 0.2, high: float = 0.2, beta: float = 0.05):
    """RLOO:  L = -mean_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i),  s_i = exp(sum_t log r_it).

    It differs from reinforce in a ratio, that of the whole completion, so that it may take several steps a batch, as TRL's; and
    in beta, the KL to the reference, as k1 in the reward, where its gradient is right. Source: "Back to Basics: Revisiting
    REINFORCE Style Optimization for Learning from Human Feedback in LLMs".
    """
    advantages = {"name": "leave_one_out", "beta": beta}
    return Parts(advantages, partial(surrogates.sequence_clip, low=low, high=high), sequence_sum, reads=_reads(beta))


@estimator
def grpo(*, low: float = 0.2, high: float = 0.2, beta: float = 0.04):
    """GRPO:  L = mean_i mean_t [-min(r A_i, clip(r, 1 - low, 1 + high) A_i) + beta k3].

    A_i: the reward less its group's mean, over the group's standard deviation. It differs from PPO in having no critic. Short
    right and long wrong answers weigh more, by 1/n_i, and groups of small deviation as much as others; see dr_grpo. Source:
    "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models".
    """
    clip, kl = partial(surrogates.clip, low=low, high=high), partial(terms.k3_in_loss, coefficient=beta)
    return Parts("group", clip, sequence_mean, (kl,))


@estimator
def dr_grpo(*, low: float = 0.2, high: float = 0.2, longest: int = 3000):
    """Dr. GRPO:  L = -sum_it min(r A_i, clip(r) A_i) / (completions * longest),  A_i = R_i - mean of the group.

    It differs from grpo in what it divides by: neither the deviation nor the lengths, which bias it. On-policy its expected
    gradient is (G - 1) / G / longest times that of the expected return. longest: the most new tokens of the rollouts; it sets
    the scale alone. Source: "Understanding R1-Zero-Like Training: A Critical Perspective".
    """
    return Parts("centred", partial(surrogates.clip, low=low, high=high), partial(constant, longest=longest))


@estimator
def dapo(*, low: float = 0.2, high: float = 0.28):
    """DAPO:  L = -mean over all tokens of min(r A_i, clip(r, 1 - low, 1 + high) A_i).

    It differs from grpo in a higher upper bound, which leaves room to rare tokens, in counting every token the same, and in
    having no KL. Resampling and the length's penalty are the rollouts'. Source: "DAPO: An Open-Source LLM Reinforcement
    Learning System at Scale".
    """
    return Parts("group", partial(surrogates.clip, low=low, high=high), token_mean)


@estimator
def gspo(*, low: float = 3e-4, high: float = 4e-4):
    """GSPO:  L = -mean_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i),  s_i = exp(mean_t log r_it).

    It differs from grpo in clipping whole completions, by bounds of a mean's scale; on-policy the two are the same but for the
    KL. Source: "Group Sequence Policy Optimization".
    """
    return Parts("group", partial(surrogates.gspo, low=low, high=high), sequence_mean)


@estimator
def cispo(*, cap: float = 5.0):
    """CISPO:  L = -mean over all tokens of sg(min(r, cap)) A_i log p.

    It differs from dapo in capping the weight instead of dropping the token's gradient. cap is an absolute ratio (TRL's
    epsilon_high, 5 recommended), not 1 + high. Source: "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning
    Attention"; the cap from "The Art of Scaling Reinforcement Learning Compute for LLMs".
    """
    return Parts("group", partial(surrogates.cispo, cap=cap), token_mean)


@estimator
def sapo(*, positive: float = 1.0, negative: float = 1.05):
    """SAPO:  L = -mean_i mean_t f(r) A_i,  f(r) = 4/t s(t (r - 1)),  t = positive or negative by the sign of A_i.

    It differs from grpo in a soft gate for the clip: the gradient fades with the distance from r = 1. Source: "Soft Adaptive
    Policy Optimization".
    """
    return Parts("group", partial(surrogates.sapo, positive=positive, negative=negative), sequence_mean)


@estimator
def gmpo(*, low: float = 0.4, high: float = 0.4):
    """GMPO:  L = -mean_i A_i exp(mean_t log r_it, each within -low and high where that makes the loss larger).

    It differs from gspo in clipping each token, inside the mean; bounds are of log r. Source: "Geometric-Mean Policy
    Optimization".
    """
    return Parts("group", partial(surrogates.gmpo, low=low, high=high), sequence_mean)


@estimator
def reinforce_pp(*, low: float = 0.2, high: float = 0.2, beta: float = 0.01):
    """REINFORCE++:  dapo's loss with a token's advantage, the return from there on of  1[t last] R - beta k1_t,  whitened.

    It differs from grpo in a baseline of the whole batch: it needs no groups. With them, take rollouts.advantages
    reinforce_pp_baseline. Source: "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage
    Normalization".
    """
    clip = partial(surrogates.clip, low=low, high=high)
    return Parts({"name": "reinforce_pp", "beta": beta}, clip, token_mean, reads=_reads(beta))


@estimator
def ppo(
    *,
    low: float = 0.2,
    high: float = 0.2,
    gamma: float = 1.0,
    decay: float = 0.95,
    beta: float = 0.05,
    coefficient: float = 0.1,
    value_clip: float = 0.2,
):
    """PPO with a critic:  L = -mean over tokens of min(r A_t, clip(r) A_t) + coefficient * (the critic's loss).

    A_t: generalised advantage estimates, with gamma and decay (lambda), of the reward at the last token and -beta k1 at each.
    The critic is one more leaf of the tree, params["value_head"]["kernel"] [D,1]; it learns the returns, as terms.value says.
    It differs from reinforce_pp in that a token's baseline is what was to be expected there. The values are those of
    the weights that sampled. Source: "Proximal Policy Optimization Algorithms"; its settings from TRL.
    """
    clip = partial(surrogates.clip, low=low, high=high)
    critic = partial(terms.value, coefficient=coefficient, clip=value_clip)
    advantages = {"name": "gae", "gamma": gamma, "decay": decay, "beta": beta}
    return Parts(advantages, clip, token_mean, (critic,), reads=_reads(beta))


# ------------------------------------------------------------------------------------------------ Other frameworks' defaults


@estimator
def trl(*, low: float = 0.2, high: float = 0.2, delta: float | None = None, beta: float = 0.0):
    """What TRL 1.16's GRPOTrainer does by default: dapo with equal bounds, and k3 times the differentiated ratio for the KL.

    The deviation is unbiased, and 1e-4 added to it. delta: its two-sided clipping. Its other normalisers are `variant`s, of
    which sequence_mean counts completions without a learned token, as ours does.
    """
    clip, kl = partial(surrogates.clip, low=low, high=high, delta=delta), partial(terms.kl_k3_ratio, coefficient=beta)
    return Parts({"name": "group", "eps": 1e-4, "ddof": 1}, clip, token_mean, (kl,))


@estimator
def verl(*, low: float = 0.2, high: float = 0.2, dual: float = 3.0, beta: float = 0.0, bonus: float = 0.0):
    """What verl 0.9 does by default for GRPO: a dual clip, 1e-6 added to an unbiased deviation, a mean over all tokens.

    beta: its kl_loss_coef with low_var_kl; bonus: its entropy_coeff. Its seq-mean aggregations leave completions without a
    learned token out of the count: {"name": "sequence_mean", "empty": false} in a `variant`.
    """
    clip = partial(surrogates.clip, low=low, high=high, dual=dual)
    more = (partial(terms.k3_in_loss, coefficient=beta), partial(terms.entropy, coefficient=bonus))
    return Parts({"name": "group", "eps": 1e-6, "ddof": 1}, clip, token_mean, more)


@estimator
def tulu(*, low: float = 0.2, high: float = 0.2, beta: float = 0.01):
    """open-instruct's GRPO with Tulu 3.1's settings: rewards less their group's mean, not divided by the deviation.

    The divided form of its earlier runs is rollouts.advantages {"name": "group", "eps": 1e-8, "ddof": 0}. It drops groups whose
    rewards are all equal, which the rollouts do. Source: "Tulu 3: Pushing Frontiers in Open Language Model Post-Training".
    """
    clip, kl = partial(surrogates.clip, low=low, high=high), partial(terms.k3_in_loss, coefficient=beta)
    return Parts("centred", clip, token_mean, (kl,))


# ------------------------------------------------------------------------------------------------------------ Any of them


@estimator
def variant(
    *,
    of: Mapping | str = "policy_gradient.grpo",
    surrogate: Mapping | str | None = None,
    aggregation: Mapping | str | None = None,
    weightings: Mapping | None = None,
    added_terms: Mapping | None = None,
    coefficient: float | None = None,
):
    """Another method with parts exchanged (surrogate, aggregation, the policy term's coefficient) or added (weightings,
    added_terms).

    of: the method, as a config entry. A part is a name of its table, or {"name": ..., settings}; parts to add are {name:
    settings}, a term's settings also the number that is its coefficient: added_terms={"entropy": 0.01}. So LUSPO is gspo with
    the aggregation sequence_sum, and VESPO dapo with the surrogate vespo. Raises UserError for what is in no table.
    """
    method = inside(of)
    chosen = {
        kind: part(TABLES[kind], entry, kind)
        for kind, entry in (("surrogate", surrogate), ("aggregation", aggregation))
        if entry is not None
    }
    if coefficient is not None:
        chosen["coefficient"] = coefficient
    return method._replace(
        **chosen,
        weightings=(*method.weightings, *added(TABLES["weighting"], weightings or {}, "weighting")),
        terms=(*method.terms, *added(TABLES["term"], added_terms or {}, "term")),
    )


def _reads(beta: float) -> Mapping:
    return REFERENCE if beta else {}
