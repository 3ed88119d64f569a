"""The nodes in a real ComfyUI over HTTP: the example graph, equality with Load LoRA, cancel and resume, errors."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
from comfy_graphs import CHECKPOINT, Prompt, drawing, graph, node, picture, run_template
from comfy_host import ComfyServer, PromptFailed, PromptInterrupted, find_comfyui, find_python
from comfy_page import Page
from helpers import DEMO, ROOT
from pack.trainer.adapters.kohya import read_header
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.comfy


def test_comfyui_loads_the_pack(server: ComfyServer) -> None:
    server.log_start = 0
    assert re.search(r"seconds: .*dreambooth-lora", server.log())
    assert "IMPORT FAILED): " not in server.log()


def test_start_costs_next_to_nothing() -> None:
    """CPU time beside that of ComfyUI's own imports in the same process: seen are 0.06 s of 4.2 s, or 1.4 %."""
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI")
    command = [str(find_python(comfyui)), str(ROOT / "tests" / "support" / "comfy_start.py"), str(comfyui)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = json.loads(done.stdout.splitlines()[-1])
    assert seconds["nodes"] == 19
    assert seconds["pack"] < 0.05 * seconds["host"]


TEMPLATES = {  # → what a run leaves in the LoRA folder
    "train_then_generate": ["my-dog"],
    "train_with_priors": ["my-dog-with-priors"],
    "two_subjects": ["first", "second"],
    "two_subjects_one_run": ["dog-and-cat"],
    "two_stages": ["concept", "concept-and-dog"],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_run(name: str, server: ComfyServer) -> None:
    """From checkpoint to saved picture."""
    class_pictures = server.base_dir / "output" / "dreambooth" / "class-pictures"
    before = {*class_pictures.glob("*/*.png")}
    history, prompt = run_template(name, server)
    saved = next(key for key, entry in prompt.items() if entry["class_type"] == "SaveImage")
    assert picture(server, history, saved).std() > 0
    for file in TEMPLATES[name]:
        assert (server.base_dir / "models" / "loras" / f"{file}.safetensors").is_file()
    assert "lora key not loaded" not in server.log()
    assert "NOT LOADED" not in server.log()
    if name == "train_with_priors":
        assert len({*class_pictures.glob("*/*.png")} - before) == 2


def test_every_node_has_help_and_tooltips(server: ComfyServer) -> None:
    ours = {name: info for name, info in server.object_info().items() if name.startswith("DreamBooth")}
    assert len(ours) == 19
    for name, info in ours.items():
        assert (ROOT / "web" / "docs" / f"{name}.md").is_file()
        for kind in ("required", "optional"):
            for field, spec in info["input"].get(kind, {}).items():
                assert spec[1].get("tooltip"), f"{name}.{field}"
                assert not spec[1].get("control_after_generate"), f"{name}.{field} would change by itself"


def test_file_gives_the_same_picture_as_the_output(server: ComfyServer) -> None:
    """Train LoRA's MODEL, ComfyUI's own Load LoRA and our Load → Apply agree; the base differs."""
    file = "same.safetensors"
    entry = server.wait(server.queue(graph(name="same") | drawing("ours", ["train", 0], ["train", 1])))
    loaders: Prompt = {
        "base": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "load": node(
            "LoraLoader", model=["base", 0], clip=["base", 1], lora_name=file, strength_model=1.0, strength_clip=1.0
        ),
        "read": node("DreamBoothLoadLora", file=file),
        "apply": node(
            "DreamBoothApplyLora",
            model=["base", 0],
            clip=["base", 1],
            lora=["read", 0],
            strength_model=1.0,
            strength_clip=1.0,
        ),
    }
    others = loaders | drawing("host", ["load", 0], ["load", 1]) | drawing("apply", ["apply", 0], ["apply", 1])
    other = server.wait(server.queue(others | drawing("plain", ["base", 0], ["base", 1])))
    ours = picture(server, entry, "ourssave")
    np.testing.assert_array_equal(ours, picture(server, other, "hostsave"))
    np.testing.assert_array_equal(ours, picture(server, other, "applysave"))
    assert (ours != picture(server, other, "plainsave")).any()
    assert "lora key not loaded" not in server.log()


def test_adapters_flow_through_the_hosts_own_nodes(server: ComfyServer) -> None:
    """LORA_MODEL is ComfyUI's own type: its Load LoRA Model and Save LoRA Weights take what Train LoRA gives."""
    prompt = graph(name="flow") | {
        "host": node("LoraModelLoader", model=["base", 0], lora=["train", 2], strength_model=1.0, bypass=False),
        "write": node("SaveLoRA", lora=["train", 2], prefix="loras/flow"),
    }
    both = prompt | drawing("train", ["train", 0], ["base", 1]) | drawing("model", ["host", 0], ["base", 1])
    entry = server.wait(server.queue(both))
    np.testing.assert_array_equal(picture(server, entry, "trainsave"), picture(server, entry, "modelsave"))
    [written] = (server.base_dir / "output" / "loras").glob("flow*.safetensors")
    ours = load_file(server.base_dir / "models" / "loras" / "flow.safetensors")
    assert set(load_file(written)) == set(ours)


def test_two_stages(server: ComfyServer) -> None:
    """A LoRA applied before is trained upon: its patches change the base, so it is another run with other weights."""
    server.wait(server.queue(graph(name="before")))
    second = graph(name="after") | {
        "concept": node(
            "LoraLoader",
            model=["base", 0],
            clip=["base", 1],
            lora_name="before.safetensors",
            strength_model=1.0,
            strength_clip=1.0,
        )
    }
    second["train"]["inputs"] |= {"model": ["concept", 0], "clip": ["concept", 1]}
    server.wait(server.queue(second))
    loras = server.base_dir / "models" / "loras"
    first, after = load_file(loras / "before.safetensors"), load_file(loras / "after.safetensors")
    assert set(first) == set(after)
    assert any((first[key] != after[key]).any() for key in first if key.endswith("lora_up.weight"))


def test_two_stages_in_one_node(server: ComfyServer) -> None:
    """The file learned on top of base_lora stacks on it, or with `combine` stands alone: the same picture."""
    first = graph(name="concept", learning_rate=1e-2)
    second = first["train"]["inputs"] | {"name": "person", "seed": 3, "base_lora": ["train", 2]}
    prompt = first | {"stage": node("DreamBoothTrainLora", **second, settings=["settings", 0])}
    prompt |= {"settings": node("DreamBoothTrainingSettings", combine=False, save_precision="fp32")}
    stacked = server.wait(server.queue(prompt | drawing("stacked", ["stage", 0], ["stage", 1])))
    prompt["settings"]["inputs"]["combine"] = True
    combined = server.wait(server.queue(prompt | drawing("combined", ["stage", 0], ["stage", 1])))
    drawn = [picture(server, stacked, "stackedsave"), picture(server, combined, "combinedsave")]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1
    files = [load_file(server.base_dir / "models" / "loras" / f"person{end}.safetensors") for end in ("", "-2")]
    ranks = [next(t.shape[0] for name, t in file.items() if "lora_down" in name) for file in files]
    assert ranks == [4, 8]
    _, facts = read_header(server.base_dir / "models" / "loras" / "person-2.safetensors")
    assert (facts["ss_network_dim"], facts["ss_network_alpha"]) == ("8", "8.0")
    assert "Resuming from step" not in server.log().split("combine")[-1]


def test_fine_tuned_checkpoint_is_loaded(server: ComfyServer) -> None:
    """All weights are trained; the node's MODEL, and the file loaded by ComfyUI itself, draw one picture."""
    prompt = graph(name="tuned", learning_rate=1e-4)
    inputs = {name: value for name, value in prompt["train"]["inputs"].items() if name != "adapter"}
    inputs.pop("base_lora_strength")
    prompt["train"] = node("DreamBoothFineTune", **inputs)
    prompt |= drawing("base", ["base", 0], ["base", 1]) | drawing("tuned", ["train", 0], ["train", 1])
    entry = server.wait(server.queue(prompt))
    assert (server.base_dir / "models" / "loras" / "tuned.safetensors").is_file()
    again = {"base": node("CheckpointLoaderSimple", ckpt_name="tuned.safetensors")}
    loaded = server.wait(server.queue(again | drawing("loaded", ["base", 0], ["base", 1])))
    tuned = picture(server, entry, "tunedsave").astype(int)
    np.testing.assert_allclose(tuned, picture(server, loaded, "loadedsave"), atol=1)  # the file's VAE is fp16
    assert (tuned != picture(server, entry, "basesave")).any()


def test_finished_run_is_returned_after_the_cache_is_gone(server: ComfyServer) -> None:
    server.wait(server.queue(graph(name="again")))
    file = server.base_dir / "models" / "loras" / "again.safetensors"
    written = file.stat().st_mtime_ns
    server.free()  # before the next prompt
    server.wait(server.queue(graph(name="again")))
    assert file.stat().st_mtime_ns == written
    assert "This run is already finished" in server.log()


def test_cancel_keeps_a_checkpoint_and_queueing_again_resumes_exactly(server: ComfyServer) -> None:
    """A run straight through equals one that was cancelled in between, tensor for tensor."""
    prompt = graph(name="cancelled", steps=100_000)
    with Page(server, "cancelled") as page:
        job = server.queue(prompt, client_id="cancelled")
        page.wait_for("dreambooth", state="training")
        server.interrupt()
        with pytest.raises(PromptInterrupted):
            server.wait(job)
    [run] = (server.base_dir / "output" / "dreambooth" / "runs").glob("cancelled-*")
    [checkpoint] = run.glob("step-*")
    step = int(checkpoint.name[5:])
    assert step > 0
    prompt["train"]["inputs"]["steps"] = step + 5
    server.wait(server.queue(prompt))
    assert f"Resuming from step {step}" in server.log()
    straight = graph(name="straight", steps=step + 5, settings=["anew", 0])
    straight["anew"] = node("DreamBoothTrainingSettings", **further_settings(resume="never"))
    server.wait(server.queue(straight))
    loras = server.base_dir / "models" / "loras"
    once, twice = load_file(loras / "straight.safetensors"), load_file(loras / "cancelled.safetensors")
    assert set(once) == set(twice)
    for key, tensor in once.items():
        assert (tensor == twice[key]).all(), key


def test_a_preset_takes_the_place_of_what_was_left_alone(server: ComfyServer) -> None:
    """Widgets that still have their defaults, on both nodes; what was changed stays."""
    prompt = graph(name="preset", preset="style", settings=["further", 0])
    prompt["further"] = node("DreamBoothTrainingSettings", **further_settings(gradient_accumulation=2))
    server.wait(server.queue(prompt))
    _, facts = read_header(server.base_dir / "models" / "loras" / "preset.safetensors")
    taken = {"ss_lr_scheduler": "linear", "ss_flip_aug": "True", "ss_text_encoder_lr": "1e-05"}
    kept = {"ss_max_train_steps": "2", "ss_learning_rate": "0.001", "ss_network_dim": "4", "ss_resolution": "(64, 64)"}
    expected = taken | kept | {"ss_gradient_accumulation_steps": "2"}
    assert {name: facts[name] for name in expected} == expected
    told = (
        "Preset style for Stable Diffusion 1.x: text_encoder_lr 1e-05, lr_schedule linear, prior_weight 1, flip true;"
    )
    assert told in server.log()


def further_settings(**changes: Any) -> dict[str, Any]:
    values = {
        "alpha": 0.0,
        "batch_size": 1,
        "gradient_accumulation": 1,
        "prior_weight": 1.0,
        "flip": False,
        "lr_schedule": "constant",
        "lr_warmup_steps": 0,
        "max_grad_norm": 1.0,
        "weight_decay": 0.01,
        "precision": "auto",
        "gradient_checkpointing": False,
        "checkpoint_every": 100,
        "keep_checkpoints": 3,
        "resume": "auto",
        "save_precision": "fp16",
    }
    return values | changes


def test_borrowed_weights_stay_as_they_are(server: ComfyServer) -> None:
    """The base draws the same picture before and after training, and its saved weights are the very same."""
    before = server.wait(server.queue({"base": graph()["base"]} | drawing("before", ["base", 0], ["base", 1])))
    server.wait(server.queue(graph(name="between")))
    after = {"base": graph()["base"]} | drawing("after", ["base", 0], ["base", 1])
    save = node("ModelSave", model=["base", 0], filename_prefix="saved")
    entry = server.wait(server.queue(after | {"weights": save}))
    np.testing.assert_array_equal(picture(server, before, "beforesave"), picture(server, entry, "aftersave"))
    saved = load_file(next((server.base_dir / "output").glob("saved*.safetensors")))
    original = load_file(server.base_dir / "models" / "checkpoints" / CHECKPOINT)
    names = [name for name in original if name.startswith("model.diffusion_model.")]
    assert names
    for name in names:
        assert (saved[name].float() == original[name].float()).all(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 512}, "Rank 512 is larger than the layer"),
        ({"name": "a/b"}, "name"),
        ({"resolution": 100}, "resolution"),
    ],
    ids=["rank", "name", "resolution"],
)
def test_bad_input_is_named(server: ComfyServer, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptFailed) as failure:
        server.wait(server.queue(graph(**changes)))
    remedy, problem = failure.value.exception_message.strip().split("\n\n")
    assert message in problem
    assert re.match(r"(Set|Change|Lower|Choose) ", remedy)


def test_foreign_adapter_is_refused(server: ComfyServer) -> None:
    """An adapter none of whose modules fits is an error, not a silent nothing."""
    import torch
    from safetensors.torch import save_file

    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.zeros(4, 640), f"{name}.lora_up.weight": torch.zeros(640, 4)}
    save_file(tensors, server.base_dir / "models" / "loras" / "other family.safetensors")
    prompt = {
        "base": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "read": node("DreamBoothLoadLora", file="other family.safetensors"),
        "apply": node(
            "DreamBoothApplyLora",
            model=["base", 0],
            clip=["base", 1],
            lora=["read", 0],
            strength_model=1.0,
            strength_clip=1.0,
        ),
    }
    with pytest.raises(PromptFailed) as failure:
        server.wait(server.queue(prompt | drawing("foreign", ["apply", 0], ["apply", 1])))
    assert "does not fit this model" in failure.value.exception_message


def test_save_never_overwrites(server: ComfyServer) -> None:
    prompt = graph(name="source") | {
        "save": node("DreamBoothSaveLora", lora=["train", 2], name="kept", precision="fp16"),
    }
    server.wait(server.queue(prompt))
    prompt["save"]["inputs"]["precision"] = "fp32"
    server.wait(server.queue(prompt))
    loras = server.base_dir / "models" / "loras"
    assert (loras / "kept.safetensors").is_file()
    assert (loras / "kept-2.safetensors").is_file()


def test_the_model_library_shows_the_sample(server: ComfyServer) -> None:
    """ComfyUI finds it beside the file, and sends it as WebP."""
    settings = node("DreamBoothTrainingSettings", preview_steps=1, preview_count=1)
    prompt = graph(name="shown", preview_every=2, settings=["settings", 0]) | {"settings": settings}
    server.wait(server.queue(prompt))
    listed = server.get("/experiment/models/loras")
    [entry] = [entry for entry in json.loads(listed) if entry["name"] == "shown.safetensors"]
    content = server.get(f"/experiment/models/preview/loras/{entry['pathIndex']}/shown.safetensors")
    expected = io.BytesIO()
    Image.open(server.base_dir / "models" / "loras" / "shown.preview.png").save(expected, "WEBP")
    pixels = [np.asarray(Image.open(file).convert("RGB"), dtype=float) for file in (io.BytesIO(content), expected)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 2, "versions of the encoder may differ a little"
    assert Image.open(io.BytesIO(content)).format == "WEBP"


def test_a_trained_file_tells_no_path(server: ComfyServer) -> None:
    """Neither where ComfyUI lies, nor the folders of pictures and of the model that scores."""
    secret = "anna-private"
    shutil.copytree(server.base_dir / "input" / "dog", server.base_dir / "input" / f"rex {secret}")
    scorer = shutil.copytree(DEMO / "scorer", server.base_dir / f"scorer {secret}")
    settings = node("DreamBoothTrainingSettings", score_clip=str(scorer), preview_steps=1, preview_count=1)
    prompt = graph(name="told nobody", preview_every=2, settings=["settings", 0]) | {"settings": settings}
    prompt["subject"]["inputs"]["folder"] = f"rex {secret}"
    prompt["score"] = node("DreamBoothSaveLora", lora=["train", 2], name="saved again", precision="fp16")
    server.wait(server.queue(prompt))
    loras = server.base_dir / "models" / "loras"
    files = [path for name in ("told nobody", "saved again") for path in loras.glob(f"{name}.*")]
    assert len(files) == 8, "each with a sample and two cards"
    for path in files:
        content = path.read_bytes()
        for private in (secret, server.base_dir.name, "scorer"):
            assert private.encode() not in content, (path.name, private)
            assert json.dumps(private)[1:-1].encode() not in content, (path.name, private)
    shutil.rmtree(scorer)
