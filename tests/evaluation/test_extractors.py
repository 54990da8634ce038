import json
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch_fidelity import register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from sit_atconv.evaluation import extractors
from sit_atconv.evaluation.extractors import Extractor, open_extractor
from sit_atconv.runtime.files import sha256_of
from tests.conftest import relative_error
from tests.encoders.test_dinov2 import as_timm, cls_token, make_dinov2
from tests.pixel_features import Pixels


@pytest.fixture(scope="module")
def images():
    """Noise, uint8 (2, 3, 250, 270), on which every resizing filter gives another result."""
    return torch.randint(0, 256, (2, 3, 250, 270), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Payload:
    """Object that writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def offline(*args, **kwargs):
    raise URLError("no route")


# ----------------------------------------------------------------------------------------------------- any extractor


def test_outputs_have_names_and_are_float32():
    def network(x):
        return x.flatten(1).double(), x.flatten(1)[:, :2].half()

    opened = Extractor("x", network, None, ("features", "logits"), "none")
    outputs = opened(torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2))
    assert {name: (tuple(t.shape), t.dtype) for name, t in outputs.items()} == {
        "features": ((2, 12), torch.float32),
        "logits": ((2, 2), torch.float32),
    }
    assert json.loads(json.dumps(opened.describe())) == {
        "name": "x",
        "sha256": None,
        "outputs": ["features", "logits"],
        "resize": "none",
    }
    with pytest.raises(ValueError, match="zip"):
        Extractor("x", network, None, ("features", "logits", "spatial"), "none")(torch.zeros(2, 3, 2, 2))


@pytest.fixture
def tf32():
    """Switches TF32 on for cuDNN and cuBLAS."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    yield backends
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def test_tf32_is_off_during_extraction_and_restored_afterwards(tf32):
    seen = []

    def network(images):
        seen.append([backend.allow_tf32 for backend in tf32])
        return torch.zeros(len(images), 2), torch.zeros(len(images), 3)

    Extractor("x", network, None, ("features", "logits"), "none")(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    assert seen == [[False, False]] and all(backend.allow_tf32 for backend in tf32)


def test_the_digits_extractor():
    opened = open_extractor("digits")
    outputs = opened(torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
    assert [(name, tuple(t.shape)) for name, t in outputs.items()] == [("features", (5, 48)), ("logits", (5, 10))]
    assert opened.resize == "none" and opened.sha256 == sha256_of(extractors.SHIPPED["digits"].weights)
    with pytest.raises(ValueError, match="'digits' has its own weights"):
        open_extractor("digits", str(extractors.SHIPPED["digits"].weights))


def test_unknown_names_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"no extractor 'clip9'.*digits, dinov2, dinov2-vit.*inception.*vgg16"):
        open_extractor("clip9")
    for name in ("inception", "dinov2", "vgg16"):
        with pytest.raises(ValueError, match=rf"no file .*nowhere: give --weights .*'{name}'"):
            open_extractor(name, str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------- registered extractors


class Two(Pixels):
    @staticmethod
    def get_provided_features_list():
        return "bright", "dark"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return {"fid": "dark", "isc": "bright"}[metric]

    def forward(self, x):
        values = {"bright": x.flatten(1), "dark": 255 - x.flatten(1)}
        return tuple(values[name] for name in self.features_list)


class Scaled(Pixels):
    """Extractor with a parameter, set here or read from a file."""

    scale = 1.0

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__(name, features_list)
        if feature_extractor_weights_path:
            self.load_state_dict(torch.load(feature_extractor_weights_path))
        else:
            self.factor = torch.nn.Parameter(torch.tensor(self.scale))
            self.register_buffer("flags", torch.tensor([True, False]))


class Downloads(Pixels):
    error = None

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__(name, features_list)
        raise self.error


@pytest.fixture
def register():
    """register(kind) registers an extractor and returns its name."""
    names = []

    def run(kind):
        names.append(f"of-a-test-{len(names)}")
        register_feature_extractor(names[-1], kind)
        return names[-1]

    yield run
    for name in names:
        del FEATURE_EXTRACTORS_REGISTRY[name]


def test_one_tensor_serves_as_features_and_logits(register):
    opened = open_extractor(register(Pixels))
    outputs = opened(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8))
    assert list(outputs) == ["features", "logits"] and torch.equal(outputs["features"], torch.ones(2, 9))
    assert torch.equal(outputs["features"], outputs["logits"]) and opened.sha256 is None
    assert opened.resize == "its own"


def test_features_and_logits_are_the_layers_of_fid_and_inception_score(register):
    outputs = open_extractor(register(Two))(torch.full((2, 3, 1, 1), 200, dtype=torch.uint8))
    assert outputs["features"].tolist() == [[55] * 3] * 2 and outputs["logits"].tolist() == [[200] * 3] * 2


def test_other_parameters_have_another_digest(register, monkeypatch, tmp_path):
    name = register(Scaled)
    first, again = open_extractor(name).sha256, open_extractor(name).sha256
    monkeypatch.setattr(Scaled, "scale", 2.0)
    assert first == again != open_extractor(name).sha256 and len(first) == 64
    torch.save({}, tmp_path / "empty.pth")
    assert open_extractor(name, str(tmp_path / "empty.pth")).sha256 == sha256_of(tmp_path / "empty.pth")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth does not hold its weights; give their path as --weights$"):
        open_extractor(name, str(tmp_path / "other.pth"))
    (tmp_path / "html.pth").write_bytes(b"<html>")
    for extractor in (name, "vgg16", "clip-rn50"):
        with pytest.raises(ValueError, match=r"html.pth"):
            open_extractor(extractor, str(tmp_path / "html.pth"))


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("no internet\nconnection")])
def test_registered_extractors_that_cannot_download(register, monkeypatch, error):
    monkeypatch.setattr(Downloads, "error", error)
    with pytest.raises(ValueError, match=r"could not be opened \(.*no (route|internet).*\).* network .*--weights"):
        open_extractor(register(Downloads))


def test_registered_extractors_that_take_no_weights(register, monkeypatch, tmp_path):
    (tmp_path / "w").write_bytes(b"")
    with pytest.raises(ValueError, match="takes no weights from a file: leave out --weights"):
        open_extractor(register(Pixels), str(tmp_path / "w"))
    monkeypatch.setattr(Downloads, "error", NotImplementedError())  # as torch-fidelity's DINOv2
    with pytest.raises(ValueError, match="takes no weights from a file: leave out --weights"):
        open_extractor(register(Downloads), str(tmp_path / "w"))


# ----------------------------------------------------------------------------------------------------- Inception


@pytest.fixture
def as_published(monkeypatch):
    """as_published(path) makes that file pass for the published weights."""
    return lambda path: monkeypatch.setattr(extractors, "INCEPTION_SHA256", sha256_of(path)[:8])


def test_inception(inception_file, as_published, images):
    as_published(inception_file)
    opened = open_extractor("inception", str(inception_file))
    passes, branches = [], []
    opened.network.Conv2d_1a_3x3.register_forward_hook(lambda *call: passes.append(call))
    opened.network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: branches.append(call[-1]))
    outputs = opened(images)
    assert {name: tuple(t.shape) for name, t in outputs.items()} == {
        "features": (2, 2048),
        "logits": (2, 1008),
        "spatial": (2, 2023),
    }
    assert opened.describe() == {
        "name": "inception",
        "sha256": sha256_of(inception_file),
        "outputs": list(outputs),
        "resize": "299x299, bilinear as TensorFlow 1",
    }
    assert len(passes) == 1

    branch = branches[0].tolist()  # (2, 192, 17, 17)
    channels_last = [[branch[b][c][i][j] for i in range(17) for j in range(17) for c in range(7)] for b in range(2)]
    assert outputs["spatial"].tolist() == channels_last
    assert len(set(channels_last[0])) > 500  # other orders would give other values

    theirs = extractors.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_file))(images)
    assert torch.equal(outputs["features"], theirs[0]) and torch.equal(outputs["logits"], theirs[1])


def test_another_file_is_not_inception(inception_file):
    with pytest.raises(ValueError, match=r"sha256 begins with .*, not 6726825d; .*--weights"):
        open_extractor("inception", str(inception_file))


def test_weights_that_run_code_are_refused(tmp_path, as_published):
    path = tmp_path / "evil.pth"
    torch.save({"fc.bias": Payload(tmp_path / "owned")}, path)
    as_published(path)
    for name in ("inception", "inception-v3-compat", "vgg16", "dinov2"):
        with pytest.raises(ValueError, match=r"evil\.pth cannot be read.*would run code; download .*--weights"):
            open_extractor(name, str(path))
        assert not (tmp_path / "owned").exists(), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: torch.save({"a": torch.zeros(9999)}, f) or f.write_bytes(f.read_bytes()[:20_000]), "cannot be read"),
        (lambda f: f.write_bytes(b"<html>404</html>"), "cannot be read"),
        (lambda f: f.write_bytes(b""), "cannot be read"),
        (lambda f: torch.save([torch.zeros(2)], f), "holds more than named tensors"),
        (lambda f: torch.save({"model": {"a": torch.zeros(2)}}, f), "holds more than named tensors"),
    ],
)
def test_files_that_hold_no_weights(tmp_path, as_published, make, message):
    for name in ("weights.pth", "weights.safetensors"):
        make(path := tmp_path / name)
        as_published(path)
        extractor = "inception" if path.suffix == ".pth" else "dinov2"
        with pytest.raises(ValueError, match=rf"{name} ({message}|cannot be read).* download .*--weights"):
            open_extractor(extractor, str(path))


def test_inception_weights_with_other_names_are_refused(tmp_path, as_published):
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    as_published(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth does not hold its weights") as raised:
        open_extractor("inception", str(tmp_path / "weights.pth"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "file"), [("inception", "weights-inception"), ("dinov2", "dinov2_vitl14_pretrain")])
def test_the_error_without_network_names_the_remedy(monkeypatch, tmp_path, name, file):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=rf"{file}.*could not be downloaded.*fetch https.*{file}.*--weights"):
        open_extractor(name)


# ----------------------------------------------------------------------------------------------------- DINOv2


def test_dinov2_reads_files_of_meta_and_timm(tmp_path, images):
    torch.save(weights := make_dinov2(), tmp_path / "meta.pth")
    save_file(as_timm(weights), tmp_path / "timm.safetensors")
    results = []
    for file in ("meta.pth", "timm.safetensors"):
        opened = open_extractor("dinov2", str(tmp_path / file))
        assert opened.describe() == {
            "name": "dinov2-128",
            "sha256": sha256_of(tmp_path / file),
            "outputs": ["features"],
            "resize": "224x224, bicubic, antialiased",
        }
        outputs = opened(images)
        assert list(outputs) == ["features"] and outputs["features"].dtype == torch.float32
        results.append(outputs["features"])
    assert torch.equal(*results) and relative_error(results[0], cls_token(weights, images)) < 1e-5


def test_only_the_published_width_has_the_published_name(tmp_path):
    save_file(as_timm(make_dinov2(width=1024, depth=1, side=16)), tmp_path / "timm.safetensors")
    assert open_extractor("dinov2", str(tmp_path / "timm.safetensors")).name == "dinov2"


def test_the_error_for_another_transformer_names_its_file(tmp_path):
    torch.save(make_dinov2(depth=1) | {"head.weight": torch.zeros(10, 128)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth cannot be used: its head.weight .*without registers; download"):
        open_extractor("dinov2", str(tmp_path / "other.pth"))


def test_a_download_of_dinov2_is_verified(tmp_path, monkeypatch):
    def download(url, path, hash_prefix):
        assert hash_prefix == "d5383ea8" and url.endswith("/dinov2_vitl14_pretrain.pth")
        torch.save(make_dinov2(depth=1), path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ValueError, match=r"pretrain\.pth is not https.*not d5383ea8; download it again"):
        open_extractor("dinov2")
    digest = sha256_of(tmp_path / "checkpoints" / "dinov2_vitl14_pretrain.pth")
    monkeypatch.setattr(extractors, "DINOV2_SHA256", digest[:8])
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert open_extractor("dinov2").sha256 == digest
