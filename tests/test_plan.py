"""Plans of pods. The slow tests run the compiler, and need `flax-qformer[tpu]`."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import flax_qformer as fq
from flax_qformer.commands.main import main
from flax_qformer.errors import InputError
from flax_qformer.models import attention
from flax_qformer.models.config import BLIP2_VIT_L
from flax_qformer.parallel.mesh import mesh_context
from flax_qformer.planning.planner import CHIPS, flops
from flax_qformer.planning.traffic import count_traffic

PROGRAM = """HloModule step

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

%condition (state: (s32[], f32[8,128])) -> pred[] {
  %state = (s32[], f32[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (state.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state.1 = (s32[], f32[8,128]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %x.1 = f32[8,128] get-tuple-element(%state.1), index=1
  %reduced = f32[8,128] all-reduce(%x.1), replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %next = (s32[], f32[8,128]) tuple(%i.1, %reduced)
}

%all-reduce-scatter (own: f32[8,128]) -> f32[1,128] {
  %own = f32[8,128] parameter(0)
  %added = f32[8,128] all-reduce(%own), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  ROOT %mine = f32[1,128] slice(%added), slice={[0:1], [0:128]}
}

%row (whole: f32[8,128]) -> f32[1,128] {
  %whole = f32[8,128] parameter(0)
  %same = f32[8,128] bitcast(%whole)
  ROOT %sliced = f32[1,128] slice(%same), slice={[0:1], [0:128]}
}

ENTRY %main (start: (s32[], f32[8,128])) -> f32[32,128] {
  %start = (s32[], f32[8,128]) parameter(0)
  %loop = (s32[], f32[8,128]) while(%start), condition=%condition, body=%body
  %x.2 = f32[8,128] get-tuple-element(%loop), index=1
  %every = f32[64,128] all-gather(%x.2), replica_groups=mesh['a'=8,'b'=8], device_ids=([8,8]T(1,0)) {'a'}
  %part = f32[1,128] fusion(%x.2), kind=kCustom, calls=%all-reduce-scatter
  %first = f32[1,128] fusion(%x.2), kind=kLoop, calls=%row
  ROOT %all = f32[32,128] all-gather(%x.2), replica_groups=mesh['a'=4,'b'=4] {'b'}, dimensions={0}
}
"""


def test_loops_count_per_iteration_and_slices_by_their_size() -> None:
    counted, size = count_traffic(PROGRAM), 8 * 128 * 4
    assert counted.collectives == {"all-reduce": 1, "all-gather": 2, "reduce-scatter": 1}
    assert counted.wire == {
        "all-reduce": 12 * 2 * size * 3 / 4,
        "all-gather": 3 * size + 7 * size,
        "reduce-scatter": size * 7 / 8,
    }
    # The loop, the two gathers, the sliced sum, the slice.
    assert counted.memory == 12 * 2 * size + (size + 4 * size) + (size + 8 * size) + (size + size / 8) + 2 * size / 8


@pytest.mark.parametrize(
    ("known", "foreign"),
    [
        ("%less = pred[] compare(%i, %limit), direction=LT", "%less = compare(%i, %limit) -> pred[]"),
        ("%less = pred[] compare(%i, %limit), direction=LT", "%less = pred[] compare(i, limit), direction=LT"),
        ("%less = pred[] compare(%i, %limit), direction=LT", "%less = pred[] compare(%j, %limit), direction=LT"),
        ("%less = pred[] compare(%i, %limit), direction=LT", "%less = ? compare(%i, %limit), direction=LT"),
        ("%x = f32[] parameter(0)", "%x = f32[] parameter(first)"),
        ("%loop = (s32[], f32[8,128]) while(%start), condition=%condition, body=%body", "%loop = while {"),
        ("while(%start), condition=%condition, body=%body", "while(%start), condition=%condition, do=%body"),
        ("kind=kLoop, calls=%row", "kind=kLoop, calls=%rows"),
        ("replica_groups={{0,1,2,3}}, to_apply", "replica_groups=all, to_apply"),
        ("replica_groups=mesh['a'=4,'b'=4] {'b'}", "replica_groups=mesh['a'=4,'b'=4] {'c'}"),
        ("%body (state.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {", "computation %body {"),
        ("%body (state.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {", "computation %body:"),
        ("ENTRY %main", "%main"),
    ],
)
def test_a_program_text_of_another_xla_is_not_understood(known: str, foreign: str) -> None:
    assert known in PROGRAM
    line = r"the program text of this XLA version \(jax \S+, .*libtpu.*\) is not understood: ['\"].+['\"]"
    with pytest.raises(InputError, match=rf"^{line}; run pip install 'jax\[tpu\]==[\d.]+'$") as caught:
        count_traffic(PROGRAM.replace(known, foreign))
    assert len(str(caught.value)) < 300


def test_products_count_if_they_are_used() -> None:
    def program(x: jax.Array, flag: jax.Array) -> jax.Array:
        x @ x.T
        y = jax.lax.cond(flag, lambda: x @ x, lambda: (x @ x) @ x)
        return jax.lax.fori_loop(0, 5, lambda _, y: y @ x, y)

    traced = jax.make_jaxpr(program)(jnp.ones((8, 8)), True)
    assert flops(traced.jaxpr) == (2 + 5) * 2 * 8**3


def test_convolutions_kernels_and_forms_of_a_platform_count() -> None:
    def program(image: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = nn.Conv(8, (3, 3), strides=2).apply({"params": {"kernel": kernel, "bias": jnp.zeros(8)}}, image)
        return features, attention.dot_product_attention(x, x, x)[0]

    kernel = jnp.ones((3, 3, 4, 8))
    image, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 6, 10, 4), (2, 1024, 3, 40)))
    traced = jax.make_jaxpr(program)(image, x).jaxpr
    convolution, products = 2 * (2 * 3 * 5 * 8) * (3 * 3 * 4), 2 * 2 * 2 * 3 * 1024**2
    assert flops(traced) == convolution + products * 40
    # A TPU's flash kernel has 128 lanes.
    assert flops(traced, "tpu") == convolution + products * 128
    with mesh_context(fq.make_mesh()):
        on_mesh = jax.make_jaxpr(program)(image, x).jaxpr
    assert "shard_map" in str(on_mesh)
    assert flops(on_mesh, "tpu") == convolution + products * 128


SHALLOW = dataclasses.replace(
    BLIP2_VIT_L,
    vision_config=dataclasses.replace(BLIP2_VIT_L.vision_config, num_hidden_layers=2),
    qformer_config=dataclasses.replace(BLIP2_VIT_L.qformer_config, num_hidden_layers=2),
)

HAS_COMPILER = importlib.util.find_spec("libtpu") is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs pip install 'flax-qformer[tpu]'")


@pytest.mark.skipif(HAS_COMPILER, reason="libtpu is installed")
def test_without_the_compiler_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--topology", "v5e:4x4", "--batch", "512"])
    assert ended.value.code == 2
    assert "pip install 'flax-qformer[tpu]'" in capsys.readouterr().err


def run(folder: Path, *arguments: str, config: fq.Blip2Config = BLIP2_VIT_L) -> subprocess.CompletedProcess[str]:
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    program = Path(sys.executable).with_name("flax-qformer")
    command = [str(program), "plan", "--model", str(folder / "config.json"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@needs_compiler
def test_the_full_step_fits_pods_and_its_collectives_do_not_grow(tmp_path: Path) -> None:
    plans: dict[str, dict[str, Any]] = {}
    for topology, chips in (("v5e:4x4", 16), ("v5e:16x16", 256), ("v5p:4x4x4", 64)):
        began = time.monotonic()
        done = run(tmp_path, "--topology", topology, "--batch", str(32 * chips), "--remat", "--json")
        assert done.returncode == 0, done.stderr
        plans[topology] = json.loads(done.stdout)
        print(f"in {time.monotonic() - began:.0f} s:", plans[topology])
        assert plans[topology]["chips"] == chips
        assert plans[topology]["fits"]
    small, large = (sum(plans[name]["collectives"].values()) for name in ("v5e:4x4", "v5e:16x16"))
    assert large <= small
    # A chip's memory does not grow either: it holds only a few tokens of other chips' images at a time.
    assert plans["v5e:16x16"]["temporaries"] < 1.3 * plans["v5e:4x4"]["temporaries"]


@pytest.mark.slow
@needs_compiler
def test_out_of_memory_is_an_answer(tmp_path: Path) -> None:
    done = run(tmp_path, "--topology", "v5e:2x2", "--batch", "16384", config=SHALLOW)
    assert done.returncode == 0, done.stderr
    assert "missing" in done.stdout
    advised = re.search(r"--batch (\d+)", done.stdout)
    assert advised
    plan = json.loads(run(tmp_path, "--topology", "v5e:2x2", "--json", *advised[0].split(), config=SHALLOW).stdout)
    assert plan["fits"]
    # The advice is three quarters of the batch that seems to fit.
    room = CHIPS["v5e"].memory - plan["parameters"] - plan["optimizer"]
    assert 0.6 * room < plan["temporaries"] < room


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("topology", "mesh"), [("v5e:4x4", "data=-1,fsdp=4,tensor=2"), ("v5p:4x4x4", "data=-1,fsdp=8")]
)
def test_mesh_axes_may_differ_from_pod_axes(topology: str, mesh: str, tmp_path: Path) -> None:
    done = run(tmp_path, "--topology", topology, "--batch", "64", "--mesh", mesh, config=SHALLOW)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("topology", ["v5e:4x4x4", "v5e:5x5", "v5p:0x4x4", "v4:4x4x4", "v5e:16x32"])
def test_unknown_pods(topology: str, tmp_path: Path) -> None:
    done = run(tmp_path, "--topology", topology, "--batch", "64", config=SHALLOW)
    assert done.returncode == 2
    assert re.search("take one such as|the largest is v5e:16x16", done.stderr.splitlines()[-1])


@pytest.mark.slow
@needs_compiler
def test_texts_too_long_for_the_model(tmp_path: Path) -> None:
    done = run(tmp_path, "--topology", "v5e:4x4", "--batch", "64", "--text-length", "513", config=SHALLOW)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--text-length is 513; the model has 512 positions")


def run_generation(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("flax-qformer")
    command = [str(program), "plan", "--for", "generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@needs_compiler
def test_drawing_at_full_size_reaches_half_of_the_peak() -> None:
    done = run_generation("--topology", "v5e:1x1", "--batch", "8", "--size", "512x512", "--steps", "50", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    print(plan)
    step = plan["programs"]["denoising step"]
    assert step["runs"] == 51
    # Published: 0.803 TFLOP for a sample, of which guidance has two.
    assert step["flops"] == pytest.approx(16 * 0.803e12, rel=0.02)
    assert plan["share_of_peak"] >= 0.5
    assert plan["headroom"] > 0


@pytest.mark.slow
@needs_compiler
def test_sizes_that_do_not_divide_cannot_be_planned() -> None:
    for size, words in (("512x500", "multiples of 8"), ("512", "--size is 512; write the width and the height")):
        done = run_generation("--topology", "v5e:1x1", "--batch", "8", "--size", size)
        assert done.returncode == 2
        assert words in done.stderr
