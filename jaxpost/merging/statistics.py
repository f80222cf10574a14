"""Merges that weigh each model by what its data say matters: by squared gradients, or by the inputs of its layers.

Both take statistics of every model {name of the tensor: array}, or a folder with them in a safetensors file.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxpost.errors import UserError
from jaxpost.merging.coefficients import Each
from jaxpost.merging.tensorwise import tensorwise


@tensorwise(each=("weight",), statistics=("information",), elementwise=True)
def fisher(
    tensor: np.ndarray,
    *others: np.ndarray,
    information: Sequence[Mapping[str, np.ndarray] | str],
    weight: Each = 1.0,
    floor: float = 1e-6,
) -> np.ndarray:
    """Fisher merging:  sum_i w_i F_i theta_i / sum_i w_i F_i,  elementwise, F the diagonal of the Fisher information.

    information: F of each model, of the tensors' shapes (stages/information.py makes it). floor: the least F; where
    all have it, the merge is the weighted mean. Source: "Merging Models with Fisher-Weighted Averaging". Raises UserError for a
    tensor without information.
    """
    if information is None:
        raise UserError("information has nothing of a tensor of the models; make it of the same models.")
    shares = [np.float32(w) * np.maximum(f, np.float32(floor)) for w, f in zip(weight, information, strict=True)]
    return sum(f * x for f, x in zip(shares, (tensor, *others), strict=True)) / sum(shares)


@tensorwise(each=("weight",), statistics=("moments",))
def regmean(
    tensor: np.ndarray,
    *others: np.ndarray,
    moments: Sequence[Mapping[str, np.ndarray] | str],
    weight: Each = 1.0,
    diagonal: float = 0.1,
) -> np.ndarray:
    """RegMean:  W = (sum_i w_i G_i)^-1 sum_i w_i G_i W_i,  W [in, out] a linear layer, G = X^T X of the layer's inputs.

    moments: G [in, in] of each model's linear layers; what has none is the weighted mean. diagonal: by which share G's other
    elements are reduced, which keeps the sum invertible; the paper's alpha is 1 - diagonal. Solved in float64. Source:
    "Dataless Knowledge Fusion by Merging Weights of Language Models".
    """
    models = (tensor, *others)
    if moments is None:
        return sum(np.float32(w) * x for w, x in zip(weight, models, strict=True)) / np.float32(sum(weight))
    left, right = 0.0, 0.0
    for w, x, given in zip(weight, models, moments, strict=True):
        gram = given.astype(np.float64)
        gram = w * ((1 - diagonal) * gram + diagonal * np.diag(np.diag(gram)))
        left, right = left + gram, right + gram @ x.T.astype(np.float64)
    try:
        return np.linalg.solve(left, right).T.astype(np.float32)
    except np.linalg.LinAlgError:
        raise UserError("moments: their sum has no inverse; take more data, or a larger `diagonal`.") from None
