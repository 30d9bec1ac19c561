"""Run: .venv/bin/python -m pytest tests/models/test_importer.py -q"""

import json
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitdgdm.infra.errors import (
    BadInput,
    BitDGDMError,
    CheckpointUnreadable,
    ModelMismatch,
    ModelNotFound,
    NotFinite,
    UnsafeCheckpoint,
)
from bitdgdm.models.digress import GraphTransformer
from bitdgdm.models.digress_config import QM9_NO_H, DigressConfig, Dims, HiddenDims
from bitdgdm.models.importer import import_checkpoint
from bitdgdm.models.source import content_digest, save_source, source_model

TINY = replace(
    QM9_NO_H,
    n_layers=2,
    diffusion_steps=40,
    hidden_mlp_dims=Dims(X=10, E=9, y=11),
    hidden_dims=HiddenDims(dx=16, de=12, dy=14, n_head=4, dim_ffX=18, dim_ffE=7, dim_ffy=33),
)
HYDRA: dict[str, Any] = {
    "general": {"name": "a run"},
    "model": {
        "type": "discrete", "transition": "marginal", "diffusion_steps": 40,
        "diffusion_noise_schedule": "cosine",
        "n_layers": 2, "extra_features": "all", "hidden_mlp_dims": {"X": 10, "E": 9, "y": 11},
        "hidden_dims": {"dx": 16, "de": 12, "dy": 14, "n_head": 4, "dim_ffX": 18, "dim_ffE": 7,
                        "dim_ffy": 128},
    },
    "dataset": {"name": "qm9", "remove_h": True},
}  # fmt: skip


def published_weights(config: DigressConfig = TINY, seed: int = 0) -> dict[str, Tensor]:
    """Random weights with all tensors of a published checkpoint, those that feed nothing included."""
    torch.manual_seed(seed)
    weights = dict(GraphTransformer(config).state_dict())
    h, last = config.hidden_dims, f"tf_layers.{config.n_layers - 1}"
    unused = {
        "self_attn.y_y": (h.dy, h.dy),
        "self_attn.x_y.lin": (h.dy, 4 * h.dx), "self_attn.e_y.lin": (h.dy, 4 * h.de),
        "self_attn.y_out.0": (h.dy, h.dy), "self_attn.y_out.2": (h.dy, h.dy),
        "lin_y1": (h.dim_ffy, h.dy), "lin_y2": (h.dy, h.dim_ffy), "norm_y1": (h.dy,), "norm_y2": (h.dy,),
    }  # fmt: skip
    shapes = {f"{last}.{name}": shape for name, shape in unused.items()}
    shapes |= {"mlp_out_y.0": (config.hidden_mlp_dims.y, h.dy), "mlp_out_y.2": (0, config.hidden_mlp_dims.y)}
    for name, shape in shapes.items():
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.rand(shape), torch.rand(shape[:1])
    return weights


WEIGHTS = published_weights()
DIGEST = content_digest(TINY, WEIGHTS)


def lightning(weights: dict[str, Tensor], hyper: object) -> dict[str, Any]:
    """What a Lightning trainer saves of DiscreteDenoisingDiffusion."""
    inside = OrderedDict((f"model.{name}", tensor) for name, tensor in weights.items())
    inside["train_metrics.total_ce"] = torch.tensor(1.5)
    return {
        "epoch": 7, "global_step": 1234, "pytorch-lightning_version": "2.0.4", "state_dict": inside,
        "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {"EMA": {"ema_weights": [torch.zeros(2)]}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 2e-4}]}],
        "lr_schedulers": [], "hparams_name": "kwargs", "hyper_parameters": hyper,
    }  # fmt: skip


@pytest.fixture
def hydra_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(HYDRA))
    return path


@pytest.fixture
def foreign_classes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, type]]:
    """Classes with the names and pickled states of omegaconf and of DiGress, while saving only."""
    made: dict[str, type] = {}
    for path in (
        "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode",
        "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "src.datasets.qm9_dataset.QM9infos",
        "diffusion_model_discrete.Noise", "src.diffusion.distributions.DistributionNodes",
    ):  # fmt: skip
        module, _, name = path.rpartition(".")
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            package = ".".join(parts[:depth])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        made[name] = type(name, (), {"__module__": module})
        monkeypatch.setattr(sys.modules[module], name, made[name], raising=False)
    yield made


def with_state(kind: type, **state: object) -> Any:
    made = kind()
    made.__dict__.update(state)
    return made


def omegaconf(value: Any, kinds: dict[str, type], parent: object = None) -> Any:
    if not isinstance(value, dict | list):
        meta = with_state(
            kinds["Metadata"], ref_type=Any, object_type=None, optional=True, resolver_cache=defaultdict(dict)
        )
        return with_state(kinds["AnyNode"], _metadata=meta, _parent=parent, _val=value)
    meta = with_state(
        kinds["ContainerMetadata"], ref_type=Any, object_type=dict, key_type=Any, flags={}, element_type=Any
    )
    made = with_state(
        kinds["DictConfig" if isinstance(value, dict) else "ListConfig"], _metadata=meta, _parent=parent
    )
    content: Any = [omegaconf(v, kinds, made) for v in value]
    if isinstance(value, dict):
        content = {k: omegaconf(v, kinds, made) for k, v in value.items()}
    made._content = content
    return made


# -- honest files -----------------------------------------------------------------------------------------


def test_a_lightning_checkpoint_is_imported_with_the_runs_config(tmp_path: Path, hydra_file: Path) -> None:
    torch.save(lightning(WEIGHTS, {"lr": 1e-4}), tmp_path / "last.ckpt")
    model = import_checkpoint(tmp_path / "last.ckpt", hydra_file)
    assert model.config == TINY and model.digest == DIGEST and model.name == "last"
    assert import_checkpoint(tmp_path / "last.ckpt", hydra_file, name="mine").name == "mine"


def test_a_lightning_checkpoint_with_its_config_inside_needs_no_other_file(
    tmp_path: Path, foreign_classes: dict[str, type], monkeypatch: pytest.MonkeyPatch
) -> None:
    infos = with_state(
        foreign_classes["QM9infos"], name="qm9", remove_h=True, atom_decoder=["C", "N", "O", "F"],
        valencies=[4, 3, 2, 1],
        atom_weights={0: 12, 1: 14, 2: 16, 3: 19}, max_weight=150, n_nodes=torch.tensor([0.0] + [1.0] * 5),
        node_types=torch.tensor([0.5, 0.25, 0.25, 0.0]), edge_types=torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0]),
        nodes_dist=with_state(foreign_classes["DistributionNodes"], prob=torch.ones(3)),
    )  # fmt: skip
    hyper = {
        "cfg": omegaconf({**HYDRA, "names": ["a", "b"]}, foreign_classes),
        "dataset_infos": infos,
        "noise": foreign_classes["Noise"](),
        "where": Path("/tmp"),
    }
    torch.save(lightning(WEIGHTS, hyper), tmp_path / "last.ckpt")
    monkeypatch.undo()  # the classes are gone, as on a machine without DiGress
    config = import_checkpoint(tmp_path / "last.ckpt").config
    expected = replace(
        TINY, n_pad=5, n_nodes=(0.0, *[0.2] * 5), node_marginals=(0.5, 0.25, 0.25, 0.0),
        edge_marginals=(0.5, 0.5, 0.0, 0.0, 0.0),
    )  # fmt: skip
    assert config == expected


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_a_plain_state_dict_is_imported_from_either_format(
    tmp_path: Path, hydra_file: Path, zipped: bool, prefix: str
) -> None:
    state = {prefix + name: tensor for name, tensor in WEIGHTS.items()}
    torch.save(state, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    assert import_checkpoint(tmp_path / "net.pt", hydra_file).digest == DIGEST


def test_raw_safetensors_are_imported_with_a_config(tmp_path: Path, hydra_file: Path) -> None:
    safetensors.torch.save_file(WEIGHTS, tmp_path / "net.safetensors")
    assert import_checkpoint(tmp_path / "net.safetensors", hydra_file).digest == DIGEST


def test_our_own_source_files_pass_through(tmp_path: Path) -> None:
    save_source(tmp_path / "model.safetensors", source_model(TINY, WEIGHTS, "mine"))
    model = import_checkpoint(tmp_path / "model.safetensors")
    assert (model.digest, model.name) == (DIGEST, "mine")


@pytest.mark.parametrize(
    ("dataset", "atoms", "n_pad"), [("moses", 8, 27), ("guacamol", 12, 88), ("qm9", 5, 29)]
)
def test_published_data_sets_are_known_by_name(tmp_path: Path, dataset: str, atoms: int, n_pad: int) -> None:
    dims = {"input_dims": Dims(X=atoms + 8, E=5, y=13), "output_dims": Dims(X=atoms, E=5, y=0)}
    even = (1 / atoms,) * atoms
    shape = replace(
        TINY, **dims, node_marginals=even, valencies=even, atom_weights=even, atoms=("C",) * atoms
    )
    torch.save(published_weights(shape), tmp_path / "net.pt")
    config_path = tmp_path / "config.yaml"
    config_path.write_text(yaml.safe_dump({**HYDRA, "dataset": {"name": dataset, "remove_h": False}}))
    config = import_checkpoint(tmp_path / "net.pt", config_path).config
    assert config.n_pad == n_pad and len(set(config.atoms)) == atoms
    assert DigressConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_other_data_sets_come_with_their_statistics(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "net.pt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**HYDRA, "dataset": {"name": "mine"}}))
    stats = {
        "dataset": "mine", "node_marginals": [2, 1, 1, 0], "edge_marginals": [8, 1, 1, 0, 0],
        "n_nodes": [0, 0, 1, 3],
        "atoms": ["C", "N", "S", "Cl"], "valencies": [4, 3, 2, 1], "atom_weights": [12, 14, 32, 35.45],
        "max_weight": 200,
    }  # fmt: skip
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    config = import_checkpoint(
        tmp_path / "net.pt", tmp_path / "config.yaml", stats_path=tmp_path / "stats.json"
    ).config
    assert (config.dataset, config.n_pad, config.n_nodes) == ("mine", 3, (0, 0, 0.25, 0.75))
    assert config.node_marginals == (0.5, 0.25, 0.25, 0) and config.atoms == ("C", "N", "S", "Cl")


def test_a_uniform_transition_gives_uniform_marginals(tmp_path: Path, hydra_file: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "net.pt")
    hydra_file.write_text(yaml.safe_dump({**HYDRA, "model": {**HYDRA["model"], "transition": "uniform"}}))
    config = import_checkpoint(tmp_path / "net.pt", hydra_file).config
    assert config.node_marginals == (0.25,) * 4 and config.edge_marginals == (0.2,) * 5


# -- files that don't fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "change", "word"),
    [
        ("model", {"n_layers": 5}, "n_layers=5"),
        ("model", {"hidden_dims": {"dx": 256}}, "dx=256, the tensors 16"),
        ("model", {"extra_features": "cycles"}, "extra_features"),
        ("model", {"type": "continuous"}, "type is 'continuous'"),
        ("model", {"diffusion_noise_schedule": "polynomial_2"}, "polynomial_2"),
        ("model", {"transition": "absorbing"}, "absorbing"),
        ("model", {"hidden_dims": [1, 2]}, "hidden_dims"),
        ("dataset", {"name": "zinc"}, "zinc"),
        ("dataset", {"name": "moses"}, "node_marginals has 8 entries, not 4"),
        ("dataset", {"name": None}, "which data set"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    tmp_path: Path, hydra_file: Path, section: str, change: dict[str, object], word: str
) -> None:
    torch.save(WEIGHTS, tmp_path / "net.pt")
    hydra_file.write_text(yaml.safe_dump({**HYDRA, section: {**HYDRA[section], **change}}))
    with pytest.raises(ModelMismatch, match=word) as caught:
        import_checkpoint(tmp_path / "net.pt", hydra_file)
    assert "\n" not in str(caught.value)


def test_without_a_config_nothing_is_guessed(tmp_path: Path) -> None:
    torch.save(lightning(WEIGHTS, {}), tmp_path / "last.ckpt")
    with pytest.raises(ModelMismatch, match="which data set"):
        import_checkpoint(tmp_path / "last.ckpt")


def test_missing_and_unknown_tensors_are_named(tmp_path: Path, hydra_file: Path) -> None:
    weights = {name: tensor for name, tensor in WEIGHTS.items() if name != "tf_layers.1.normE2.bias"}
    torch.save({**weights, "tf_layers.1.extra": torch.zeros(2)}, tmp_path / "net.pt")
    with pytest.raises(
        ModelMismatch, match=r"missing tf_layers\.1\.normE2\.bias; unknown tf_layers\.1\.extra"
    ):
        import_checkpoint(tmp_path / "net.pt", hydra_file)


def test_another_kind_of_network_is_named_as_such(tmp_path: Path, hydra_file: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3, 3)}, tmp_path / "net.pt")
    with pytest.raises(ModelMismatch, match=r"missing mlp_in_X\.0\.weight"):
        import_checkpoint(tmp_path / "net.pt", hydra_file)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, hydra_file: Path) -> None:
    torch.save({**WEIGHTS, "mlp_out_X.2.bias": torch.full((4,), torch.nan)}, tmp_path / "net.pt")
    with pytest.raises(NotFinite, match=r"mlp_out_X\.2\.bias"):
        import_checkpoint(tmp_path / "net.pt", hydra_file)


@pytest.mark.parametrize("text", ["- a\n- b", "model: 7", "defaults: [model: discrete]", "a: [", "{{"])
def test_a_config_file_that_is_no_composed_config_is_refused(tmp_path: Path, text: str) -> None:
    torch.save(WEIGHTS, tmp_path / "net.pt")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(BadInput, match="config"):
        import_checkpoint(tmp_path / "net.pt", tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{", '{"dataset": "x"}',
        '{"dataset": "x", "n_nodes": 3, "node_marginals": [1], "edge_marginals": [1]}',
    ],
)  # fmt: skip
def test_a_statistics_file_that_lacks_something_is_refused(
    tmp_path: Path, hydra_file: Path, text: str
) -> None:
    torch.save(WEIGHTS, tmp_path / "net.pt")
    (tmp_path / "stats.json").write_text(text)
    with pytest.raises(BadInput):
        import_checkpoint(tmp_path / "net.pt", hydra_file, stats_path=tmp_path / "stats.json")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"none\.ckpt"):
        import_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"hello world", b"\x80\x02.", b"\x80\x02]q\x00.", b"\x00" * 64]
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("net.ckpt", "net.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises((CheckpointUnreadable, UnsafeCheckpoint)) as caught:
            import_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_of_any_kind_ends_in_one_of_our_errors_or_in_the_same_weights(
    tmp_path: Path, hydra_file: Path, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(["zip", "legacy", "safetensors"]))
    path = tmp_path / ("net.safetensors" if kind == "safetensors" else "net.pt")
    if kind == "safetensors":
        safetensors.torch.save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=kind == "zip")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):  # most damage is where the structure is
            content[data.draw(st.integers(0, min(3000, len(content) - 1)))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        model = import_checkpoint(path, hydra_file)
    except BitDGDMError as error:
        assert "\n" not in str(error)
    else:
        assert model.config.n_layers == TINY.n_layers
