"""Policy-gradient objectives: raise the likelihood of sampled tokens by their advantage.

    grad = sum over tokens of  stable_mask * advantage / reference_policy * d policy

Each method below chooses four parts; numbers in brackets are the part's settings, in its order. `jaxpost.rollouts.advantages`
has the advantages, `surrogates` the ratios and their stabilisation, `estimator` the aggregations and `terms` the terms.

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

The last three are the defaults of other frameworks. A coefficient of 0 leaves a term out, at no cost. `variant` exchanges parts
of any of them:

    objective={"name": "policy_gradient.dapo"}
    objective={"name": "policy_gradient.variant", "of": "policy_gradient.dapo", "weightings": {"top_entropy": {"share": 0.2}}}

All read tokens, segments, mask, advantages and old_logps [B,S] and the scalar temperature, at which the policy is scored. Those
with a KL also read ref_logps. Log-probabilities are in nats. Rollouts use the method's advantages unless `rollouts.advantages`
names others. TRL.md maps TRL's names to these.
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

    With the leave-one-out advantage its expectation is the exact gradient of the expected return. It has no ratio and no clip,
    so it takes one step a batch. Source: "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
    Learning"; the baseline from "Buy 4 REINFORCE Samples, Get a Baseline for Free!".
    """
    return Parts("leave_one_out", surrogates.reinforce, sequence_sum)


@estimator
def rloo(*, low: float = 0.2, high: float = 0.2, beta: float = 0.05):
    """RLOO:  L = -mean_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i),  s_i = exp(sum_t log r_it).

    It differs from reinforce in the ratio of the whole completion, which allows several steps a batch, as in TRL, and in a KL
    to the reference: beta times k1, subtracted from the reward, where its gradient is right. Source: "Back to Basics:
    Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs".
    """
    advantages = {"name": "leave_one_out", "beta": beta}
    return Parts(advantages, partial(surrogates.sequence_clip, low=low, high=high), sequence_sum, reads=_reads(beta))


@estimator
def grpo(*, low: float = 0.2, high: float = 0.2, beta: float = 0.04):
    """GRPO:  L = mean_i mean_t [-min(r A_i, clip(r, 1 - low, 1 + high) A_i) + beta k3].

    A_i: the reward minus its group's mean, over the group's standard deviation. It differs from PPO in having no critic. Two
    biases: 1/n_i favours short right and long wrong answers, the deviation groups with similar rewards; see dr_grpo. Source:
    "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models".
    """
    clip, kl = partial(surrogates.clip, low=low, high=high), partial(terms.k3_in_loss, coefficient=beta)
    return Parts("group", clip, sequence_mean, (kl,))


@estimator
def dr_grpo(*, low: float = 0.2, high: float = 0.2, longest: int = 3000):
    """Dr. GRPO:  L = -sum_it min(r A_i, clip(r) A_i) / (completions * longest),  A_i = R_i - mean of the group.

    It differs from grpo in dividing neither by the deviation nor by the lengths, which bias it. On-policy its expected gradient
    is (G - 1) / G / longest times that of the expected return. longest: the rollouts' limit of new tokens; it only sets the
    scale. Source: "Understanding R1-Zero-Like Training: A Critical Perspective".
    """
    return Parts("centred", partial(surrogates.clip, low=low, high=high), partial(constant, longest=longest))


@estimator
def dapo(*, low: float = 0.2, high: float = 0.28):
    """DAPO:  L = -mean over all tokens of min(r A_i, clip(r, 1 - low, 1 + high) A_i).

    It differs from grpo in a higher upper bound, which lets rare tokens grow, in weighing every token the same, and in having
    no KL. Resampling and the length penalty are steps of the rollouts. Source: "DAPO: An Open-Source LLM Reinforcement Learning
    System at Scale".
    """
    return Parts("group", partial(surrogates.clip, low=low, high=high), token_mean)


@estimator
def gspo(*, low: float = 3e-4, high: float = 4e-4):
    """GSPO:  L = -mean_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i),  s_i = exp(mean_t log r_it).

    It differs from grpo in clipping whole completions, with bounds on a mean of log-ratios. On-policy the two differ only in
    the KL. Source: "Group Sequence Policy Optimization".
    """
    return Parts("group", partial(surrogates.gspo, low=low, high=high), sequence_mean)


@estimator
def cispo(*, cap: float = 5.0):
    """CISPO:  L = -mean over all tokens of sg(min(r, cap)) A_i log p.

    It differs from dapo in capping the weight instead of dropping the token's gradient; sg: no gradient. cap is an absolute
    ratio (TRL's epsilon_high, 5 recommended), not 1 + high. Source: "MiniMax-M1: Scaling Test-Time Compute Efficiently with
    Lightning Attention"; the cap from "The Art of Scaling Reinforcement Learning Compute for LLMs".
    """
    return Parts("group", partial(surrogates.cispo, cap=cap), token_mean)


@estimator
def sapo(*, positive: float = 1.0, negative: float = 1.05):
    """SAPO:  L = -mean_i mean_t f(r) A_i,  f(r) = 4/t s(t (r - 1)),  t = positive or negative by the sign of A_i.

    It differs from grpo in a soft gate in place of the clip: the gradient falls with the distance from r = 1. Source: "Soft
    Adaptive Policy Optimization".
    """
    return Parts("group", partial(surrogates.sapo, positive=positive, negative=negative), sequence_mean)


@estimator
def gmpo(*, low: float = 0.4, high: float = 0.4):
    """GMPO:  L = -mean_i A_i exp(mean_t log r_it, each clipped to [-low, high] where that makes the loss larger).

    It differs from gspo in clipping each token, inside the mean. The bounds are on log r. Source: "Geometric-Mean Policy
    Optimization".
    """
    return Parts("group", partial(surrogates.gmpo, low=low, high=high), sequence_mean)


@estimator
def reinforce_pp(*, low: float = 0.2, high: float = 0.2, beta: float = 0.01):
    """REINFORCE++:  dapo's loss; a token's advantage is the return from it on of  1[t last] R - beta k1_t,  whitened.

    It differs from grpo in a baseline over the whole batch, so that it needs no groups. With groups, use rollouts.advantages
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
    The critic is one more leaf, params["value_head"]["kernel"] [D,1], and learns the returns (terms.value). It differs from
    reinforce_pp in a baseline for each token, the critic's value at the weights that sampled. Source: "Proximal Policy
    Optimization Algorithms"; its settings from TRL.
    """
    clip = partial(surrogates.clip, low=low, high=high)
    critic = partial(terms.value, coefficient=coefficient, clip=value_clip)
    advantages = {"name": "gae", "gamma": gamma, "decay": decay, "beta": beta}
    return Parts(advantages, clip, token_mean, (critic,), reads=_reads(beta))


# ------------------------------------------------------------------------------------------------ Other frameworks' defaults


@estimator
def trl(*, low: float = 0.2, high: float = 0.2, delta: float | None = None, beta: float = 0.0):
    """TRL 1.16's GRPOTrainer by default: dapo with equal bounds, and k3 times the differentiated ratio for the KL.

    The deviation is the unbiased one plus 1e-4. delta: TRL's two-sided clipping. TRL's other normalisers are aggregations for
    `variant`; sequence_mean counts completions without a learned token, as in TRL.
    """
    clip, kl = partial(surrogates.clip, low=low, high=high, delta=delta), partial(terms.kl_k3_ratio, coefficient=beta)
    return Parts({"name": "group", "eps": 1e-4, "ddof": 1}, clip, token_mean, (kl,))


@estimator
def verl(*, low: float = 0.2, high: float = 0.2, dual: float = 3.0, beta: float = 0.0, bonus: float = 0.0):
    """verl 0.9's GRPO by default: a dual clip, 1e-6 added to the unbiased deviation, a mean over all tokens.

    beta: verl's kl_loss_coef with low_var_kl; bonus: its entropy_coeff. verl's seq-mean aggregations do not count completions
    without a learned token: {"name": "sequence_mean", "empty": false} in a `variant`.
    """
    clip = partial(surrogates.clip, low=low, high=high, dual=dual)
    added_terms = (partial(terms.k3_in_loss, coefficient=beta), partial(terms.entropy, coefficient=bonus))
    return Parts({"name": "group", "eps": 1e-6, "ddof": 1}, clip, token_mean, added_terms)


@estimator
def tulu(*, low: float = 0.2, high: float = 0.2, beta: float = 0.01):
    """open-instruct's GRPO with Tulu 3.1's settings: rewards minus their group's mean, not divided by the deviation.

    Its earlier runs divide: rollouts.advantages {"name": "group", "eps": 1e-8, "ddof": 0}. Groups whose rewards are all equal
    are dropped by the rollouts. Source: "Tulu 3: Pushing Frontiers in Open Language Model Post-Training".
    """
    clip, kl = partial(surrogates.clip, low=low, high=high), partial(terms.k3_in_loss, coefficient=beta)
    return Parts("centred", clip, token_mean, (kl,))


# ------------------------------------------------------------------------------------------------------------ Variants


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
    """The method `of` (a config entry) with parts replaced or added.

    surrogate, aggregation: a name of the table, or {"name": ..., settings}. coefficient: that of the policy term. weightings,
    added_terms: {name: settings}; a term's settings may be just its coefficient: added_terms={"entropy": 0.01}. LUSPO is gspo
    with the aggregation sequence_sum, VESPO dapo with the surrogate vespo. Raises UserError for an unknown part.
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
