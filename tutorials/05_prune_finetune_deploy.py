"""Tutorial 5: train, prune while fine-tuning, compile, and compare every single answer.

    python tutorials/05_prune_finetune_deploy.py         # one form of sparsity, a minute or two
    python tutorials/05_prune_finetune_deploy.py --all   # every form, twenty minutes

A convnet and a small transformer read the handwritten digits that scikit-learn brings along. Needs
PyTorch, scikit-learn and ONNX Runtime: ``pip install 'tvm-sparse[tutorials]'``. With
``--keep FOLDER`` the ONNX files and libraries stay.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# Both are read when thread pools start. Threads that wait should sleep: a pool that spins takes the
# processor from the other one.
os.environ.setdefault("TVM_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import onnx
from scipy import ndimage

import tvm_sparse as ts
from tvm_sparse.pruning import CubicSchedule, ModulePruning, prune_module, remove_dead_channels

try:
    import onnxruntime
    import onnxscript  # noqa: F401 - PyTorch's exporter needs it
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import nn
except ImportError as error:
    print(f"this tutorial needs {error.name}: pip install 'tvm-sparse[tutorials]'")
    print("done")
    raise SystemExit from None

# The digits
# ----------
# 1,797 images of 8 x 8 pixels. A quarter is held out before anything else happens, so that no
# variant of a held-out digit is ever trained on. All are enlarged to 16 x 16. Training images are
# multiplied: turned, scaled, moved and noisy. The held-out ones are counted twice, as they are and
# with such distortions; the second count is the harder one, and with four variants each the finer.

SIDE = 16
BATCH = 32


@dataclass(frozen=True)
class Images:
    """Images [count, 1, 16, 16] in float32, and which digit each one shows."""

    x: np.ndarray
    y: np.ndarray

    def distorted(self, variants: int, seed: int) -> Images:
        """Make variants of every image."""
        rng = np.random.default_rng(seed)
        x = [distort(image[0], rng)[None] for image in self.x for _ in range(variants)]
        return Images(np.stack(x), np.repeat(self.y, variants))


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is held out: as it is, and distorted."""

    train: Images
    held_out: Images
    distorted: Images


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn by up to 15 degrees, scale by up to 10 %, move by up to 1.5 pixels, add noise."""
    angle, scale = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(0.9, 1.1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    middle = (SIDE - 1) / 2
    offset = middle - turn @ np.full(2, middle) + rng.uniform(-1.5, 1.5, size=2)
    moved = ndimage.affine_transform(image, turn, offset, order=1)
    return (moved + 0.1 * rng.standard_normal(image.shape)).astype(np.float32)


def load_images(variants: int) -> Data:
    """Read, divide and enlarge the digits; each one to train on comes in `variants` more."""
    digits, labels = load_digits(return_X_y=True)
    small = digits.reshape(-1, 8, 8).astype(np.float32) / 16
    enlarged = ndimage.zoom(small, (1, 2, 2), order=1, grid_mode=True, mode="nearest")[:, None]
    parts = train_test_split(enlarged, labels, test_size=0.25, stratify=labels, random_state=0)
    train, held_out = Images(parts[0], parts[2]), Images(parts[1], parts[3])
    more = train.distorted(variants, seed=1)
    both = Images(np.concatenate([train.x, more.x]), np.concatenate([train.y, more.y]))
    return Data(both, held_out, held_out.distorted(4, seed=2))


# Two networks
# ------------
# Written as one writes them. Layers are wide enough for zeros to be worth something.


class ConvNet(nn.Module):
    """Four convolutions, 32 to 128 channels, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.features = nn.Sequential(
            *block(1, 32),
            *block(32, 64),
            nn.MaxPool2d(2),
            *block(64, 128),
            *block(128, 128),
            nn.MaxPool2d(2),
        )
        self.hidden = nn.Linear(128 * (SIDE // 4) ** 2, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, 10]."""
        return self.head(torch.relu(self.hidden(self.features(x).flatten(1))))


class Transformer(nn.Module):
    """Overlapping patches as 16 tokens of 128 features, three encoder layers, and their mean."""

    def __init__(self, features: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, features, kernel_size=8, stride=4, padding=2)
        self.places = nn.Parameter(0.02 * torch.randn(1, (SIDE // 4) ** 2, features))
        layer = nn.TransformerEncoderLayer(
            features, 4, 4 * features, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(features)
        self.encoder = nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(features, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, 10]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.encoder(tokens).mean(dim=1))


# How each one is made, and what of it stays dense, as one does: its first layer and its last.
NETWORKS = {
    "convnet": (ConvNet, ("features.0", "head")),
    "transformer": (Transformer, ("patches", "head")),
}

# Training, and training with masks
# ---------------------------------
# One loop for both. `prune_module` has put masks on the weights; as the training goes on they grow,
# fast at first and slowly at the end, in the first half of all steps, and the second half mends
# what was broken. What is cut stays cut: its gradients are zero.

GROWTHS = 8


def fit(
    net: nn.Module,
    images: Images,
    epochs: int,
    rate: float,
    masks: ModulePruning | None = None,
    after_step: Callable[[nn.Module], None] | None = None,
) -> None:
    """Train a network in place; masks grow `GROWTHS` times."""
    torch.manual_seed(0)
    x, y = torch.from_numpy(images.x), torch.from_numpy(images.y)
    batches = len(x) // 64
    pause = epochs * batches // (2 * GROWTHS)
    optimizer = torch.optim.AdamW(net.parameters(), rate)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    net.train()
    for step in range(epochs * batches):
        if step % batches == 0:
            order = torch.randperm(len(x))
        if masks and step % pause == 0 and step // pause <= GROWTHS:
            masks.update(step // pause)
        some = order[64 * (step % batches) :][:64]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[some]), y[some]).backward()
        optimizer.step()
        rates.step()
        if after_step:
            after_step(net)


def silence_dead_channels(net: nn.Module) -> None:
    """Make channels of dead weights zero behind their normalisation, too.

    A normalisation turns zeros into its shift. That is a constant, which can be folded into the
    next layer, unless that one pads its input: there the constant ends.
    """
    chains = [part for part in net.modules() if isinstance(part, nn.Sequential)]
    for layer, norm in (pair for chain in chains for pair in pairwise(chain)):
        if isinstance(norm, nn.BatchNorm2d):
            dead = (layer.weight == 0).flatten(1).all(1)
            with torch.no_grad():
                norm.weight[dead] = 0
                norm.bias[dead] = 0


# Forms of sparsity
# -----------------
# Which zeros a processor can use is a matter of where they lie, and how much a network minds them
# is, too. Every weight but the first and the last layer's is pruned to the same share.


@dataclass(frozen=True)
class Form:
    """A pattern of `prune_module`, and the share of zeros."""

    pattern: str
    zeros: float

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.pattern}, {100 * self.zeros:g} %" if self.zeros else self.pattern

    @property
    def stem(self) -> str:
        """What files call it."""
        return self.name.replace(", ", "-").replace(":", "-").replace(" %", "")


DENSE = Form("dense", 0.0)
FORMS = (
    DENSE,
    *(Form("unstructured", zeros) for zeros in (0.8, 0.9, 0.95)),
    Form("2:4", 0.5),
    Form("1:4", 0.75),
    Form("64:2:8", 0.75),
    *(Form(f"block:{size}", zeros) for size in ("4x1", "16x1", "1x16") for zeros in (0.75, 0.9)),
    Form("vector:8", 0.9),
    *(Form(f"tile-wise:{tile}", zeros) for tile in ("32", "32+5%") for zeros in (0.75, 0.9)),
    Form("kernel", 0.75),
    Form("channel", 0.5),
)


def forms_of(network: str, forms: tuple[Form, ...]) -> tuple[Form, ...]:
    """Leave out what a network has no layers for: a transformer has no kernels."""
    return tuple(form for form in forms if network == "convnet" or form.pattern != "kernel")


def train_dense(network: str, images: Images, epochs: int) -> nn.Module:
    """Train a network without any zeros."""
    torch.manual_seed(0)
    net = NETWORKS[network][0]()
    fit(net, images, epochs, 1e-3)
    return net


def prune_and_tune(
    network: str, trained: nn.Module, form: Form, images: Images, epochs: int
) -> nn.Module:
    """Prune a copy of a trained network to a form while it goes on learning.

    The dense one goes on learning, too: otherwise forms would be ahead by that.
    """
    net = copy.deepcopy(trained)
    if form == DENSE:
        fit(net, images, epochs, 1e-3)
        return net
    growth = CubicSchedule(form.zeros, steps=GROWTHS)
    skip = NETWORKS[network][1]
    masks = prune_module(net, form.pattern, scope="layer", skip=skip, schedule=growth)
    is_cut_out = form.pattern == "channel"
    fit(net, images, epochs, 1e-3, masks, silence_dead_channels if is_cut_out else None)
    return masks.make_permanent()


# To ONNX, and to a library
# -------------------------
# From here on nothing knows that it was PyTorch. Channels that are zero are cut out of the graph:
# what is left is a smaller dense network. Of every other form the zeros stay in the file, and the
# compiler finds them.


def onnx_file(folder: Path, network: str, form: Form) -> Path:
    """Say where a network of a form is kept."""
    return folder / f"{network}-{form.stem}.onnx"


def export_onnx(net: nn.Module, form: Form, file: Path) -> None:
    """Export a network for `BATCH` images at a time."""
    x = torch.zeros(BATCH, 1, SIDE, SIDE)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net.eval(), (x,), dynamo=True, verbose=False, input_names=["x"], output_names=["y"]
        )
    model = program.model_proto
    onnx.save(remove_dead_channels(model)[0] if form.pattern == "channel" else model, file)


# Every image, by both
# --------------------
# The library has to give the answer of ONNX Runtime, which knows nothing of zeros, on every single
# image; then its accuracy is that of the network which was trained.


@dataclass(frozen=True)
class Outcome:
    """What a form does to a network.

    Attributes
    ----------
    file : str
        The ONNX file's name.
    accuracy, distorted : float
        Of the compiled library, on the held-out images and on distorted ones.
    images : int
        How many there were.
    different : tuple of int
        Those for which the library and ONNX Runtime disagree.
    difference : float
        The largest one between logits, over the largest logit.
    bytes_packed, bytes_library : int
        Of the weights as they are packed, and of the file that is deployed.
    """

    network: str
    form: str
    zeros: float
    file: str
    accuracy: float
    distorted: float
    images: int
    different: tuple[int, ...]
    difference: float
    bytes_packed: int
    bytes_library: int


def logits_of(run: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """Run images through a network that takes `BATCH` at a time."""
    filled = np.concatenate([x, np.zeros((-len(x) % BATCH, *x.shape[1:]), x.dtype)])
    parts = [run(np.ascontiguousarray(part)) for part in np.split(filled, len(filled) // BATCH)]
    return np.concatenate(parts)[: len(x)]


def deploy(network: str, form: Form, file: Path, data: Data) -> Outcome:
    """Compile an ONNX file, leave the library beside it, and compare all answers."""
    module = ts.compile(file, target="native")
    module.export(file.with_suffix(".so"))
    library = ts.load_module(file.with_suffix(".so"))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    x = np.concatenate([data.held_out.x, data.distorted.x])
    y = np.concatenate([data.held_out.y, data.distorted.y])
    ours = logits_of(library, x)
    theirs = logits_of(lambda part: session.run(None, {"x": part})[0], x)
    different = np.flatnonzero(ours.argmax(1) != theirs.argmax(1))
    right = ours.argmax(1) == y
    totals = module.report.summary()
    return Outcome(
        network=network,
        form=form.name,
        zeros=form.zeros,
        file=file.name,
        accuracy=float(right[: len(data.held_out.y)].mean()),
        distorted=float(right[len(data.held_out.y) :].mean()),
        images=len(x),
        different=tuple(different.tolist()),
        difference=float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        bytes_packed=totals["bytes_packed"],
        bytes_library=file.with_suffix(".so").stat().st_size,
    )


# All of it
# ---------


@dataclass(frozen=True)
class Recipe:
    """How many variants of each image there are, and how often all are seen for what."""

    variants: int
    epochs: int
    tuning_epochs: int
    forms: tuple[Form, ...]


QUICK = Recipe(1, 5, 3, (DENSE, Form("unstructured", 0.8)))
FULL = Recipe(3, 12, 4, FORMS)


def outcomes(
    network: str, forms: tuple[Form, ...], recipe: Recipe, data: Data, folder: Path
) -> Iterator[Outcome]:
    """Train a network, bring copies of it to the forms, and deploy them one by one."""
    trained = train_dense(network, data.train, recipe.epochs)
    for form in forms:
        net = prune_and_tune(network, trained, form, data.train, recipe.tuning_epochs)
        file = onnx_file(folder, network, form)
        export_onnx(net, form, file)
        yield deploy(network, form, file, data)


def row(found: Outcome) -> str:
    """Write a line of the table."""
    same = f"{found.images - len(found.different)} of {found.images}"
    return (
        f"{found.network:12} {found.form:20} {found.accuracy:9.2%} {found.distorted:9.2%} "
        f"{found.bytes_packed / 1024:5.0f} KiB {same:>16}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every form, and longer training")
    parser.add_argument("--keep", type=Path, help="folder for the ONNX files and the libraries")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="tvm-sparse-tutorial-"))
    folder.mkdir(parents=True, exist_ok=True)
    recipe = FULL if options.all else QUICK
    data = load_images(recipe.variants)
    heads = f"{'held out':>9} {'distorted':>9} {'weights':>9} {'as ONNX Runtime':>16}"
    print(f"{'network':12} {'form':20} {heads}")
    for network in NETWORKS:
        for found in outcomes(network, forms_of(network, recipe.forms), recipe, data, folder):
            print(row(found), flush=True)
            assert found.different == (), f"other answers for images {found.different}"
    print("done")


if __name__ == "__main__":
    main()
