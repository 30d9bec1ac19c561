"""Run: .venv/bin/python -m pytest tests/quant/test_artifact.py"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from bitdgdm.infra.errors import ArtifactCorrupt, ArtifactTooNew, ModelMismatch, ModelNotFound, NotFinite
from bitdgdm.quant import container
from bitdgdm.quant.artifact import (
    FORMAT_VERSION,
    ArtifactHeader,
    apply,
    load_artifact,
    read_header,
    save_artifact,
)
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.linear import QuantLinear, set_time
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import get_recipe, recipes
from tests.quant.samples import needed

R2 = get_recipe("bitdgdm-w4a4-r16-s1")
MIXED = R2.changed(name="mixed", columns=2, column_choice="weight", premul="duquant", rank=2)
MIXED = dataclasses.replace(
    MIXED, overrides=(("trunk.2", (("weight_bits", 16),)), ("*", (("outlier_sigma", 2.0),)))
)
QUANTIZED = ("trunk.0", "trunk.2")
each_recipe = pytest.mark.parametrize("recipe", (*recipes(), MIXED), ids=lambda recipe: recipe.name)


class Net(nn.Module):
    """Three Linears, the last one kept, with odd sizes and a parameter outside any Linear."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(
            nn.Linear(7, 21), nn.ReLU(), nn.Linear(21, 20, bias=False), nn.LayerNorm(20)
        )
        self.head = nn.Linear(20, 3)
        self.register_buffer("count", torch.tensor(5))

    def forward(self, x):
        return self.head(self.trunk(x))


def content(recipe=R2, net=None):
    net = net or Net()
    layers, reports = {}, {}
    for name in QUANTIZED:
        linear = net.get_submodule(name)
        own = recipe.for_layer(name)
        stats = needed(own, linear.in_features)
        parts, reports[name] = decompose(linear.weight, own, stats, contributions=False)
        tau = torch.ones(linear.in_features) if name == "trunk.2" else None
        layers[name] = (parts, linear.bias, tau)
    kept = {name: t for name, t in net.state_dict().items() if name.rpartition(".")[0] not in QUANTIZED}
    header = ArtifactHeader(
        recipe,
        reports,
        9,
        {"dims": [1, 2], "symbols": "C\u00d8"},
        {"uri": "builtin:x", "digest": "ab"},
        "0.1.0",
    )
    return header, layers, kept


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "a.safetensors"
    save_artifact(path, *content())
    return path


def written(tmp_path, data):
    path = tmp_path / "changed.safetensors"
    path.write_bytes(data)
    return path


@each_recipe
def test_loading_gives_back_what_was_saved(tmp_path, recipe):
    header, layers, kept = content(recipe)
    digest = save_artifact(tmp_path / "a", header, layers, kept)
    found = load_artifact(tmp_path / "a")
    assert found.header == header == read_header(tmp_path / "a")
    assert found.digest == found.header.digest == read_header(tmp_path / "a").digest == digest
    for name, (parts, bias, tau) in layers.items():
        there, bias_there, tau_there = found.layers[name]
        assert there.shape == parts.shape and there.tensors().keys() == parts.tensors().keys()
        assert all(torch.equal(t, parts.tensors()[key]) for key, t in there.tensors().items())
        for mine, theirs in ((bias, bias_there), (tau, tau_there)):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.allclose(theirs.float(), mine, rtol=2.0**-11, atol=2.0**-24)
    assert found.kept.keys() == kept.keys() and int(found.kept["count"]) == 5


@each_recipe
def test_a_network_from_an_artifact_is_the_network_of_its_parts(tmp_path, recipe):
    source = Net().half().float()
    header, layers, kept = content(recipe, source)
    save_artifact(tmp_path / "a", header, layers, kept)
    built = apply(Net(seed=1), load_artifact(tmp_path / "a"))
    for name, (parts, bias, tau) in layers.items():
        parent, _, child = name.rpartition(".")
        own = recipe.for_layer(name)
        setattr(source.get_submodule(parent), child, QuantLinear.from_parts(parts, bias, own, tau))
    for net in (built, source):
        set_time(net, torch.tensor([9, 9]))
    x = torch.randn(5, 7)
    assert torch.equal(built(x), source(x))


@pytest.mark.parametrize("name", ["bitdgdm-w4a4-r16-s1", "rtn-w8a8"])
def test_a_file_of_format_1_gives_the_outputs_that_it_gave_then(name):
    """The files were written, and run, by commit 0598662."""
    folder = Path(__file__).parent / "data"
    outputs = load_file(folder / "format1-outputs.safetensors")
    net = nn.ModuleDict(
        {"first": nn.Linear(24, 33), "second": nn.Linear(33, 16, bias=False), "head": nn.Linear(16, 3)}
    )
    artifact = load_artifact(folder / f"format1-{name}.safetensors")
    assert artifact.header.format_version == 1 and artifact.header.recipe.name == name
    built = apply(net, artifact)
    y = built["head"](built["second"](torch.relu(built["first"](outputs["x"]))))
    assert torch.allclose(y, outputs[name], rtol=1e-6, atol=1e-6)


def test_two_runs_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        save_artifact(tmp_path / name, *content())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_order_in_which_layers_and_tensors_arrive_does_not_matter(tmp_path):
    header, layers, kept = content()
    backwards = dataclasses.replace(header, layers=dict(reversed(header.layers.items())))
    first = save_artifact(tmp_path / "a", header, layers, kept)
    second = save_artifact(
        tmp_path / "b", backwards, dict(reversed(layers.items())), dict(reversed(kept.items()))
    )
    assert first == second and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_digest_is_the_sha256_of_the_file_with_zeros_in_its_place(saved):
    digest = read_header(saved).digest
    blank = saved.read_bytes().replace(digest.encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == digest


def test_the_public_reader_of_the_format_reads_every_tensor(saved):
    artifact = load_artifact(saved)
    with safe_open(saved, "pt") as file:
        assert file.metadata()["format_version"] == str(FORMAT_VERSION)
        for name in file.keys():  # noqa: SIM118
            layer, _, part = name.rpartition(".")
            if layer in artifact.layers and part in artifact.layers[layer][0].tensors():
                assert torch.equal(file.get_tensor(name), artifact.layers[layer][0].tensors()[part])


def test_float_tensors_are_kept_in_16_bit_and_scales_with_them(saved):
    with safe_open(saved, "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds["head.weight"] == kinds["trunk.0.bias"] == "F16"
    assert kinds["trunk.0.scale"] == "BF16" and kinds["count"] == "I64"


def test_a_truncated_file_is_corrupt_at_every_length(saved, tmp_path):
    whole = saved.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    lengths = {
        *range(0, 40),
        *range(40, len(whole), 97),
        *range(header_end - 9, header_end + 9),
        len(whole) - 1,
    }
    for length in sorted(lengths):
        with pytest.raises(ArtifactCorrupt):
            load_artifact(written(tmp_path, whole[:length]))


def test_an_added_byte_is_corrupt(saved, tmp_path):
    with pytest.raises(ArtifactCorrupt):
        load_artifact(written(tmp_path, saved.read_bytes() + b"\0"))


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans())
def test_a_changed_byte_anywhere_is_corrupt(saved, tmp_path_factory, where, change, in_header):
    whole = bytearray(saved.read_bytes())
    size = 8 + int.from_bytes(whole[:8], "little") if in_header else len(whole)
    at = int(where * size)
    whole[at] ^= change
    with pytest.raises((ArtifactCorrupt, ArtifactTooNew)) as caught:
        load_artifact(written(tmp_path_factory.getbasetemp(), whole))
    if caught.type is ArtifactTooNew:  # only a change of the version number itself may say so
        key = saved.read_bytes().index(b'"format_version":"')
        assert key < at < key + 30


def test_every_single_space_in_the_header_counts(saved, tmp_path):
    whole = saved.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for at in (end - 1, end - 2):
        if whole[at : at + 1] == b" ":
            with pytest.raises(ArtifactCorrupt):
                load_artifact(written(tmp_path, whole[:at] + b"\t" + whole[at + 1 :]))
    swapped = whole.replace(b"\\u00d8", b"\\u00D8")  # the same text in another spelling
    assert swapped != whole
    with pytest.raises(ArtifactCorrupt):
        load_artifact(written(tmp_path, swapped))


def forged(path, tensors, metadata):
    """A file with a right digest over wrong content."""
    container.write_container(path, tensors, metadata)
    return path


def test_a_newer_format_is_refused_before_anything_else(saved, tmp_path):
    tensors, metadata = container.read_container(saved)
    path = forged(tmp_path / "a", tensors, metadata | {"format_version": "3", "header": "what comes then"})
    for read in (load_artifact, read_header):
        with pytest.raises(ArtifactTooNew) as caught:
            read(path)
        assert (caught.value.found, caught.value.supported) == (3, FORMAT_VERSION)
    whole = path.read_bytes()
    with pytest.raises(ArtifactTooNew):
        load_artifact(written(tmp_path, whole[:-10]))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("trunk.0.scale"),
        lambda t: t.pop("trunk.0.sparse_value"),
        lambda t: t.update({"trunk.0.qweight": t["trunk.0.qweight"][:, 1:]}),
        lambda t: t.update({"trunk.0.qweight": t["trunk.0.qweight"].view(torch.int8)}),
        lambda t: t.update({"trunk.0.surprise": torch.zeros(1)}),
        lambda t: t.update({"trunk.2.tau": torch.zeros(3)}),
        lambda t: t.update({"trunk.0.sparse_index": torch.full_like(t["trunk.0.sparse_index"], 60000)}),
        lambda t: t.update({"trunk.0.sparse_index": t["trunk.0.sparse_index"][:-1]}),
    ],
)
def test_tensors_that_contradict_the_header_are_corrupt_even_under_a_right_digest(saved, tmp_path, change):
    tensors, metadata = container.read_container(saved)
    change(tensors)
    with pytest.raises(ArtifactCorrupt):
        load_artifact(forged(tmp_path / "a", tensors, metadata))


EVERYTHING = Recipe("e", 4, 4, calibration="uniform", act_scale="static", act_bins=3, premul="duquant", columns=2,
                    factor_bits=4, rank=3, alpha=0.1)  # fmt: skip
ODDITIES = {
    "a time bin that isn't there": lambda t: t["trunk.0.bin_of_t"].fill_(3),
    "a negative time bin": lambda t: t["trunk.0.bin_of_t"].fill_(-1),
    "no time": lambda t: t.update({"trunk.0.bin_of_t": t["trunk.0.bin_of_t"][:1]}),
    "a range that lacks its end": lambda t: t.update({"trunk.0.act_high": t["trunk.0.act_high"][:2]}),
    "a range without zero": lambda t: t["trunk.0.act_low"].fill_(1.0),
    "a channel that isn't there": lambda t: t["trunk.0.column_index"].fill_(7),
    "a channel twice": lambda t: t["trunk.0.permutation"].fill_(1),
    "more stages than rotations": lambda t: t.update({"trunk.0.permutation": t["trunk.0.permutation"].repeat(2, 1)}),
    "blocks that don't divide": lambda t: t.update({"trunk.0.swaps": t["trunk.0.swaps"][:, :4]}),
    "factors of another width": lambda t: t.update({"trunk.0.proj_up": t["trunk.0.proj_up"][:, :1]}),
    "factors of another type": lambda t: t.update({"trunk.0.proj_up": t["trunk.0.proj_up"].view(torch.int8)}),
}  # fmt: skip


@pytest.mark.parametrize("change", ODDITIES.values(), ids=ODDITIES.keys())
def test_parts_that_name_what_is_not_there_are_corrupt_even_under_a_right_digest(tmp_path, change):
    save_artifact(tmp_path / "a", *content(EVERYTHING))
    tensors, metadata = container.read_container(tmp_path / "a")
    change(tensors)
    with pytest.raises(ArtifactCorrupt):
        load_artifact(forged(tmp_path / "b", tensors, metadata))


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("recipe"),
        lambda h: h["recipe"].update({"weight_bits": 3}),
        lambda h: h["recipe"].update({"unheard": 1}),
        lambda h: h["layers"]["trunk.0"].pop("nnz"),
        lambda h: h["layers"]["trunk.0"].update({"shape": [2, 2]}),
        lambda h: h.update({"layers": []}),
        lambda h: h.update({"n_pad": None}),
    ],
)
def test_a_header_that_makes_no_sense_is_corrupt_even_under_a_right_digest(saved, tmp_path, change):
    tensors, metadata = container.read_container(saved)
    header = json.loads(metadata["header"])
    change(header)
    with pytest.raises(ArtifactCorrupt):
        load_artifact(forged(tmp_path / "a", tensors, metadata | {"header": json.dumps(header)}))


@pytest.mark.parametrize(
    "text", [b"", b"hello", b"\x80\x04K\x01.", b"PK\x03\x04", b"\xff" * 64, b"[" * 100000]
)
def test_any_other_file_is_corrupt(tmp_path, text):
    for data in (text, len(text).to_bytes(8, "little") + text):
        for read in (load_artifact, read_header):
            with pytest.raises(ArtifactCorrupt):
                read(written(tmp_path, data))


def test_a_safetensors_file_that_is_no_artifact_is_corrupt(tmp_path):
    from safetensors.torch import save_file

    for metadata in (None, {"format": "pt"}):
        save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors", metadata=metadata)
        with pytest.raises(ArtifactCorrupt):
            load_artifact(tmp_path / "w.safetensors")


def test_a_missing_file_or_a_folder_is_reported_as_no_model(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ModelNotFound):
            load_artifact(path)


def test_a_crash_while_writing_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    save_artifact(tmp_path / "a", *content())
    before = (tmp_path / "a").read_bytes()

    def power_cut(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(OSError, match="no space"):
        save_artifact(tmp_path / "a", *content(get_recipe("rtn-w8a8")))
    assert (tmp_path / "a").read_bytes() == before and os.listdir(tmp_path) == ["a"]


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    header, layers, kept = content()
    kept["head.bias"] = kept["head.bias"] * float("nan")
    with pytest.raises(NotFinite, match=r"head\.bias"):
        save_artifact(tmp_path / "a", header, layers, kept)
    assert os.listdir(tmp_path) == []


def test_a_layer_without_report_and_a_clash_of_names_are_refused(tmp_path):
    header, layers, kept = content()
    with pytest.raises(ValueError, match="report"):
        save_artifact(tmp_path / "a", header, {"trunk.0": layers["trunk.0"]}, kept)
    with pytest.raises(ValueError, match="name of a part"):
        save_artifact(tmp_path / "a", header, layers, kept | {"trunk.0.weight": torch.zeros(1)})


def test_a_network_that_does_not_fit_is_refused_and_left_as_it_was(saved):
    artifact = load_artifact(saved)
    lacks, extra, wider, other = Net(), Net(), Net(), Net()
    del lacks.head
    extra.more = nn.Linear(2, 2)
    wider.trunk[0] = nn.Linear(8, 21)
    other.trunk[2] = nn.ReLU()
    for net, problem in (
        (lacks, "head.weight"),
        (extra, "more.weight"),
        (wider, "trunk.0"),
        (other, "trunk.2"),
    ):
        before = {name: t.clone() for name, t in net.state_dict().items()}
        with pytest.raises(ModelMismatch, match=problem):
            apply(net, artifact)
        assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
        assert not any(isinstance(module, QuantLinear) for module in net.modules())


def test_layers_that_were_dropped_by_name_may_be_missing(tmp_path):
    header, layers, kept = content()
    net = Net()
    net.unused = nn.Linear(2, 2)
    save_artifact(tmp_path / "a", dataclasses.replace(header, dropped=("unused",)), layers, kept)
    apply(net, load_artifact(tmp_path / "a"))
