"""SpecKV's MLP16 in numpy, and its weight files (arXiv 2605.02888).

The network maps (mean entropy, mean confidence, max entropy, min confidence, compression code, gamma) through 16 ReLU
units to the acceptance rate accepted / gamma, clipped to [0, 1]. The four signals are those of the tokens
drafted so far in the step where the network is read within it, and lagged ones of the
:class:`~policies.base.Context` before it.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from policies.base import ARMS, FADE, LEVEL_CODES, MAX_GAMMA, NEUTRAL, Context, PolicyError, reason
from policies.level_features import level_bits

INPUTS, HIDDEN = 6, 16
SHAPES = {"W1": (INPUTS, HIDDEN), "b1": (HIDDEN,), "W2": (HIDDEN, 1), "b2": (1,)}
DEFAULT_WEIGHTS = Path(__file__).parents[1] / "data" / "mlp16.npz"


@dataclass(frozen=True)
class Weights:
    """MLP16's weights: W1 (6, 16), b1 (16,), W2 (16, 1), b2 (1,).

    ``phi_cov`` (17, 17) is the offline data's mean phi phi^T, where known.
    """

    W1: np.ndarray
    b1: np.ndarray
    W2: np.ndarray
    b2: np.ndarray
    phi_cov: np.ndarray | None = None

    @property
    def moments(self) -> np.ndarray:
        """``phi_cov`` made regular, shape (17, 17); the identity where it is not known."""
        d = HIDDEN + 1
        found = np.eye(d) if self.phi_cov is None else self.phi_cov
        # Units that were never active offline have no precision of their own: a little of the mean stands in.
        regular: np.ndarray = found + 0.01 * np.trace(found) / d * np.eye(d)
        return regular

    @property
    def head(self) -> np.ndarray:
        """[W2; b2], shape (17,)."""
        return np.append(self.W2[:, 0], self.b2)

    def hidden(self, x: np.ndarray) -> np.ndarray:
        """relu(x W1 + b1) of inputs (N, 6), shape (N, 16)."""
        found: np.ndarray = np.maximum(x @ self.W1 + self.b1, 0.0)
        return found

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Acceptance rates of inputs (N, 6), clipped to [0, 1], shape (N,)."""
        found: np.ndarray = np.clip(self.hidden(x) @ self.W2[:, 0] + self.b2[0], 0.0, 1.0)
        return found


def load_weights(path: str | Path) -> Weights:
    """Read weights from an ``.npz``; arrays ``x_mean`` and ``x_scale``, if there, are folded into W1 and b1.

    Raises
    ------
    PolicyError
        If the file is missing, a pickle, not an npz, lacks an array, or holds wrong shapes, NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise PolicyError(f"no weights at {path}: give weights=FILE.npz, or train with python -m experiments.train")
    if path.suffix in (".pkl", ".pickle", ".joblib") or not zipfile.is_zipfile(path):
        raise PolicyError(
            f"{path} is not an npz; pickles are refused because loading one can run any code: where you trust it, "
            "export its arrays with np.savez('mlp16.npz', W1=..., b1=..., W2=..., b2=...) and give that file"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key]) for key in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise PolicyError(f"cannot read weights from {path}: {reason(error)}") from error
    return check_weights(arrays, str(path))


def check_weights(arrays: Mapping[str, np.ndarray], source: str) -> Weights:
    """Check named arrays and build :class:`Weights`; ``source`` is named in errors."""
    shapes: dict[str, tuple[int, ...]] = dict(SHAPES)
    shapes |= {"phi_cov": (HIDDEN + 1, HIDDEN + 1), "x_mean": (INPUTS,), "x_scale": (INPUTS,)}
    missing = [key for key in SHAPES if key not in arrays]
    if missing:
        raise PolicyError(f"{source} lacks the arrays {', '.join(missing)}; MLP16 needs W1, b1, W2, b2")
    found: dict[str, np.ndarray] = {}
    for key in [key for key in shapes if key in arrays]:
        value = arrays[key]
        if value.shape != shapes[key]:
            raise PolicyError(f"{source}: {key} has shape {value.shape}, MLP16 needs {shapes[key]}")
        if value.dtype.kind not in "fiu" or not np.isfinite(value).all():
            raise PolicyError(f"{source}: {key} must hold finite numbers only")
        found[key] = value.astype(float)
    if ("x_mean" in found) != ("x_scale" in found):
        raise PolicyError(f"{source}: x_mean and x_scale come together or not at all")
    W1, b1 = found["W1"], found["b1"]
    if "x_mean" in found:
        if not (found["x_scale"] > 0).all():
            raise PolicyError(f"{source}: x_scale must be positive")
        W1 = W1 / found["x_scale"][:, None]
        b1 = b1 - found["x_mean"] @ W1
    return Weights(W1, b1, found["W2"], found["b2"], found.get("phi_cov"))


def level_code(level: str) -> float:
    """MLP16's code of a compression level; a level that it never saw gets the code of the nearest number of bits."""
    if level in LEVEL_CODES:
        return LEVEL_CODES[level]
    bits = level_bits(level)
    return min(((16, 0.0), (8, 1.0), (4, 2.0)), key=lambda known: abs(known[0] - bits))[1]


class StepNet:
    """MLP16's hidden layer, read within a step from the signals of the tokens drafted so far.

    Parameters
    ----------
    weights : Weights
        Trained weights.

    Attributes
    ----------
    matrix : ndarray, shape (4, 16)
        What mean entropy, mean confidence, greatest entropy and least confidence are multiplied with.
    units : list of tuple
        The same by unit.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.matrix = np.ascontiguousarray(weights.W1[:4])
        self.units: list[tuple[float, float, float, float]] = [tuple(row) for row in self.matrix.T.tolist()]
        self._rest: dict[str, np.ndarray] = {}

    def rest(self, level: str) -> np.ndarray:
        """Return by gamma, from 0 on, what level, gamma and b1 add before the ReLU, shape (17, 16)."""
        found = self._rest.get(level)
        if found is None:
            w = self.weights
            found = w.b1 + level_code(level) * w.W1[4] + np.outer(np.arange(MAX_GAMMA + 1.0), w.W1[5])
            self._rest[level] = found
        return found

    def hidden(self, levels: Sequence[str], at: np.ndarray, signals: np.ndarray, gammas: np.ndarray) -> np.ndarray:
        """Return the hidden layer of many tokens, shape (N, 16).

        Parameters
        ----------
        levels : sequence of str
        at : ndarray of int, shape (N,)
            Each token's level, as an index.
        signals : ndarray, shape (N, 4)
            In the order of ``matrix``.
        gammas : ndarray of int, shape (N,)
            How many tokens were drafted, each token included.
        """
        rest = np.array([self.rest(level) for level in levels])
        found: np.ndarray = np.maximum(signals @ self.matrix + rest[at, gammas], 0.0)
        return found


class Mlp16:
    """MLP16 evaluated for all arms of a decision at once, with buffers that are reused from call to call.

    Parameters
    ----------
    weights : Weights
        Trained weights.
    arms : sequence of int
        The gammas to evaluate, K of them.
    """

    def __init__(self, weights: Weights, arms: tuple[int, ...] = ARMS) -> None:
        self.weights, self.arms = weights, arms
        self._gammas = np.array(arms, dtype=float)
        self._head = weights.head
        self._matrices: dict[str, np.ndarray] = {}
        # An array rather than the scalar 0: numpy converts a scalar operand anew at every call.
        self._shape = HIDDEN + 1, len(arms)
        size = self._shape[0] * len(arms)
        self._flat, self._zero = np.empty(size), np.zeros(size)

    def scaled(self, level: str, x: np.ndarray) -> np.ndarray:
        """Return gamma * phi of every arm, shape (17, K), overwritten by the next call; ``x`` (6,).

        As gamma relu(z) = relu(gamma z), one product and one maximum do for all arms, constant included, and a head's
        product with the result is in accepted tokens.
        """
        matrix = self._matrices.get(level)
        if matrix is None:
            W1, b1, g = self.weights.W1, self.weights.b1, self._gammas
            matrix = np.zeros((6, HIDDEN + 1, len(g)))
            matrix[:4, :HIDDEN] = W1[:4, :, None] * g
            matrix[5, :HIDDEN] = ((b1 + level_code(level) * W1[4])[:, None] + np.outer(W1[5], g)) * g
            matrix[5, HIDDEN] = g
            matrix = self._matrices[level] = matrix.reshape(6, -1)
        np.dot(x, matrix, self._flat)
        np.maximum(self._flat, self._zero, out=self._flat)
        return self._flat.reshape(self._shape)  # made anew: in a deep copy, a view that is kept is of nothing

    def phi(self, levels: Sequence[str], x: np.ndarray) -> np.ndarray:
        """Return [relu(x W1 + b1), 1] of S decisions' arms, shape (S, K, 17); ``x`` (S, 6)."""
        W1 = self.weights.W1
        codes = np.array([level_code(level) for level in levels])
        z = x[:, :4] @ W1[:4] + np.multiply.outer(codes, W1[4]) + self.weights.b1
        found = np.ones((len(x), len(self.arms), HIDDEN + 1))
        np.add(z[:, None, :], np.multiply.outer(self._gammas, W1[5]), out=found[:, :, :HIDDEN])
        np.maximum(found, 0.0, out=found)
        return found

    def read(self, context: Context) -> np.ndarray:
        """Return the context's four signals, its acceptance and a constant 1, shape (6,).

        While nothing is drafted the lagged signals stay what they were. They would hold a policy at gamma 0 for ever
        after one hard stretch, so with each idle step they fade towards what a context starts with.
        """
        c = context
        values: Iterable[float] = (c.mean_entropy, c.mean_confidence, c.max_entropy, c.min_confidence, c.acceptance)
        if c.idle:
            keep = FADE**c.idle
            values = [n + keep * (v - n) for v, n in zip(values, NEUTRAL, strict=True)]
        return np.array((*values, 1.0))

    def predict(self, context: Context) -> np.ndarray:
        """Return every arm's predicted acceptance rate, in [0, 1], shape (K,)."""
        rates: np.ndarray = self.phi([context.level], self.read(context)[None])[0] @ self._head
        np.clip(rates, 0.0, 1.0, out=rates)
        return rates

    def tokens(self, level: str, x: np.ndarray) -> np.ndarray:
        """Return every arm's predicted accepted tokens, rate * gamma with the rate in [0, 1], shape (K,)."""
        found: np.ndarray = np.dot(self._head, self.scaled(level, x))
        np.maximum(found, self._zero[: len(found)], out=found)
        np.minimum(found, self._gammas, out=found)
        return found


def resolve_weights(weights: str | Path | Weights) -> Weights:
    """Return weights as given, read from a file, or the shipped ones for an empty string."""
    if isinstance(weights, Weights):
        return weights
    return load_weights(weights or DEFAULT_WEIGHTS)
