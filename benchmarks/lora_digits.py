"""The few-step LoRA of a fine-tune, from training to stock diffusers: a small network of SD 3.5's class on digits.

    python benchmarks/lora_digits.py                  # some 20 minutes of one core; goes on where it stopped
    python benchmarks/lora_digits.py --lora-only      # without the student of all weights, half of the time
    python benchmarks/lora_digits.py --quick          # a few steps: shows that it runs, writes no record
    python benchmarks/lora_digits.py --table          # the table of docs/few_step_lora.md from the record; runs nothing

A base learns scikit-learn's digits by prompt, the prompts a fixed table of tokens; all of its weights are fine-tuned on
the same digits with thickened strokes, a style that it has never seen. Of that fine-tune a FACM student is trained as
LoRA, whose teacher is the fine-tune itself (`teacher=base`), and one as all weights (`teacher=checkpoint`). The LoRA is
exported, loaded by `StableDiffusion3Pipeline.load_lora_weights` over the fine-tune, and drawn by that pipeline. Judges
have not seen the pictures that they are tested on: which digit, and in which style, by support vector machines.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from harness import RESULTS, ROOT, machine, markdown, refresh, write_json

sys.path.insert(0, str(ROOT / "src"))

import diffusers

from flowanchor import compose
from flowanchor.base.noise import renoiser, sample_noise
from flowanchor.checkpoints import latest_checkpoint, load_model
from flowanchor.checkpoints.format import DescribedWeights, Format
from flowanchor.checkpoints.read import read_checkpoint, select_weights
from flowanchor.data.lightning import LightningData
from flowanchor.interfaces import Batch
from flowanchor.metrics.frechet import Gaussian, frechet_distance
from flowanchor.plugins.backbones.diffusers.texts import PooledTokens
from flowanchor.plugins.backbones.lora import is_adapter
from flowanchor.plugins.data.digits import DigitsDataModule
from flowanchor.plugins.formats.lora_file import LoraFile
from flowanchor.plugins.formats.transformer_folder import TransformerFolder
from flowanchor.plugins.samplers.consistency import ConsistencySampler
from flowanchor.plugins.samplers.flow import FlowSampler
from flowanchor.programs.train import build_module, build_trainer

WIDTH, TOKENS = 32, 4  # of a prompt
NETWORK = (
    "{sample_size: 8, patch_size: 2, in_channels: 1, out_channels: 1, num_layers: 3, num_attention_heads: 4, "
    "attention_head_dim: 16, joint_attention_dim: 32, caption_projection_dim: 64, pooled_projection_dim: 32, "
    "pos_embed_max_size: 12, dual_attention_layers: [0], qk_norm: rms_norm}"
)
RANK, ALPHA = 16, 32
GUIDANCE, TEACHER_STEPS = 2.0, 50
STEPS = (1, 2, 4)
SAMPLES, BATCH = 1000, 100
LENGTHS = {"base": 1200, "fine_tune": 300, "lora": 400, "whole": 400}
PAGE, NAME = ROOT / "docs" / "few_step_lora.md", "lora digits table"


def prompts() -> PooledTokens:
    """The ten prompts: random directions, always the same."""
    draw = torch.Generator().manual_seed(0)
    return PooledTokens(torch.randn(10, TOKENS, WIDTH, generator=draw), torch.randn(10, WIDTH, generator=draw))


def thickened(images: Tensor) -> Tensor:
    """[B, 1, 8, 8] -> the same with wider strokes: the brightest of 2 x 2 pixels."""
    padded = torch.nn.functional.pad(images, (0, 1, 0, 1), mode="replicate")
    return torch.nn.functional.max_pool2d(padded, 2, stride=1)


class Prompted(DigitsDataModule):
    """Digits, each with its prompt; thick ones where that is the style."""

    def __init__(self, thick: bool) -> None:
        super().__init__(batch_size=32)
        self.thick, self.table = thick, prompts()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        cond = PooledTokens(*(part[batch.cond] for part in self.table))
        return Batch(thickened(batch.x1) if self.thick else batch.x1, cond)


def train(name: str, steps: int, thick: bool, *words: str) -> None:
    """`outputs/train/NAME`, by what train.py builds of these words; a finished run is kept."""
    folder = Path("outputs/train") / name
    if (folder / "finished").is_file():
        return
    print(f"training {name}: {steps} steps", flush=True)
    began = time.process_time()
    torch.manual_seed(0)
    cfg = compose(
        "backbone=diffusers", "data=digits", "codec=identity", "~callbacks.best", "~callbacks.sample_grid",
        "callbacks.last.every_n_train_steps=200", "trainer.limit_val_batches=0", "ema.snapshot_every=null",
        "ema.sigma_rel=[0.1]", f"backbone.text_len={TOKENS}", "optimizer.betas=[0.9,0.99]",
        "callbacks.progress.every_n_steps=200", "callbacks.progress.plain=true", f"trainer.max_steps={steps}",
        f"name={name}", *words,
    )  # fmt: skip
    begun = latest_checkpoint(folder)
    before = 0 if begun is None else int(read_checkpoint(begun)["flowanchor"]["step"])
    module = build_module(cfg, initialise=begun is None)
    trainer = build_trainer(cfg, folder, module, "auto")
    trainer.fit(module, LightningData(Prompted(thick)), ckpt_path=begun, weights_only=True)
    spent = (time.process_time() - began) * steps / max(steps - before, 1)  # of a part, where it was interrupted
    (folder / "finished").write_text(str(spent))


def exported(name: str, format: Format, folder: str) -> Path:
    """A run in the form of a format, as convert.py writes it."""
    output = Path(folder)
    if not output.is_dir():
        file = Path("outputs/train") / name / "checkpoints" / "last.ckpt"
        content = read_checkpoint(file)
        ema, weights = select_weights(content, None, file)
        print(format.write(DescribedWeights(file, weights, content["flowanchor"], ema), output), flush=True)
    return output


STUDENT = (
    "objective=facm", "initialise_from=fine_tune", f"teacher.guidance_scale={GUIDANCE}", "teacher.guidance_low=0",
    "backbone.tangent_smoothing=0.01",
)  # fmt: skip
LORA = ("teacher=base", f"backbone.lora.rank={RANK}", f"backbone.lora.alpha={ALPHA}", "optimizer.lr=2e-3")
# Not the folder, which does not say that its texts have four tokens: zeros up to the released length would be told.
WHOLE = ("teacher=checkpoint", "teacher.checkpoint=outputs/train/fine_tune", "optimizer.lr=5e-4")


def flows(lengths: dict[str, int]) -> None:
    """Base and fine-tune."""
    scratch = ("backbone/description=sd3", f"backbone.settings={NETWORK}")
    flow = ("objective=flow_matching", "objective/interval=plain", "backbone.condition_dropout=0.1")
    train("base", lengths["base"], False, *scratch, *flow, "optimizer.lr=1e-3")
    base = exported("base", TransformerFolder(), "base")
    train("fine_tune", lengths["fine_tune"], True, f"initialise_from={base}", *flow, "optimizer.lr=5e-4")
    exported("fine_tune", TransformerFolder(), "fine_tune")


def student(name: str, lengths: dict[str, int]) -> None:
    """The LoRA, or all weights."""
    warmup = f"objective.anchor_warmup_steps={min(50, lengths[name] // 2)}"
    train(name, lengths[name], True, *STUDENT, *(LORA if name == "lora" else WHOLE), warmup)


# ------------------------------------------------------------------------------------------------------------- judges


class Judges:
    """Read thick digits, tell them from plain ones, and compare with all that there are."""

    def __init__(self) -> None:
        sets = DigitsDataModule(batch_size=1).load()
        plain = {split: one.stack(range(len(one))).float() / 127.5 - 1 for split, one in sets.items()}
        thick = {split: thickened(images) for split, images in plain.items()}
        digits = {split: np.asarray(one.labels) for split, one in sets.items()}
        self.reader = SVC(gamma="scale").fit(_flat(thick["train"]), digits["train"])
        both = np.concatenate([_flat(plain["train"]), _flat(thick["train"])])
        self.critic = SVC(gamma="scale").fit(both, np.repeat([0, 1], len(both) // 2))
        self.gaussian = gaussian(torch.cat([thick["train"], thick["heldout"]]))
        self.held = {
            "digit": float(self.reader.score(_flat(thick["heldout"]), digits["heldout"])),
            "style": float(self.critic.predict(_flat(thick["heldout"])).mean()),
            "style of plain ones": float(self.critic.predict(_flat(plain["heldout"])).mean()),
        }

    def __call__(self, images: Tensor, digits: np.ndarray) -> dict[str, float]:
        """Pictures [N, 1, 8, 8] of prompted digits -> shares that show them, and the style; the distance."""
        shown = images.clamp(-1, 1)
        return {
            "digit": float((self.reader.predict(_flat(shown)) == digits).mean()),
            "style": float(self.critic.predict(_flat(shown)).mean()),
            "fd": frechet_distance(gaussian(shown), self.gaussian),
        }


def _flat(images: Tensor) -> Any:
    return images.flatten(1).double().numpy()


def gaussian(images: Tensor) -> Gaussian:
    """Of the pixels."""
    flat = _flat(images)
    return Gaussian(flat.mean(0), np.cov(flat, rowvar=False))


# -------------------------------------------------------------------------------------------------------------- drawn


def asked(samples: int) -> tuple[Tensor, PooledTokens, np.ndarray]:
    """Noise, prompts and digits: the same for everybody."""
    digits = np.arange(samples) % 10
    return sample_noise(0, range(samples), (1, 8, 8)), PooledTokens(*(part[digits] for part in prompts())), digits


def ours(name: str, sampler: Any, samples: int) -> Tensor:
    """Pictures of a run's averaged weights, by a sampler of the project."""
    model = load_model(Path("outputs/train") / name)
    noise, cond, _ = asked(samples)
    drawn = []
    for start in range(0, samples, BATCH):
        rows = range(start, min(start + BATCH, samples))
        part = PooledTokens(*(one[rows.start : rows.stop] for one in cond))
        fresh = renoiser(0, rows, (1, 8, 8), torch.device("cpu"))
        begin = noise[rows.start : rows.stop].float()
        drawn.append(sampler.sample(model.backbone, begin, part, model.interval, fresh))
    return torch.cat(drawn).float()


def stock(steps: int, samples: int) -> Tensor:
    """Pictures of the exported LoRA, by stock diffusers over the fine-tune."""
    output = exported("lora", LoraFile(steps=steps, base_model="fine_tune"), f"lora_{steps}")
    transformer = diffusers.SD3Transformer2DModel.from_pretrained("fine_tune")
    pipe: Any = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(output))
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(output / "scheduler")
    noise, cond, _ = asked(samples)
    torch.manual_seed(0)
    drawn = []
    for start in range(0, samples, BATCH):
        part = PooledTokens(*(one[start : start + BATCH] for one in cond))
        found = pipe(
            prompt_embeds=part.tokens, pooled_prompt_embeds=part.pooled, height=64, width=64, guidance_scale=1,
            latents=noise[start : start + BATCH].float(), output_type="latent", num_inference_steps=steps,
        )  # fmt: skip
        drawn.append(found.images)
    return torch.cat(drawn)


def drawers(samples: int, whole: bool = True) -> dict[str, Callable[[], Tensor]]:
    """Who draws, by network and number of steps."""

    def flow(name: str, steps: int) -> Callable[[], Tensor]:
        return lambda: ours(name, FlowSampler(steps, guidance_scale=GUIDANCE), samples)

    def jumps(name: str, steps: int) -> Callable[[], Tensor]:
        return lambda: ours(name, ConsistencySampler(steps), samples)

    found = {f"{name}, {TEACHER_STEPS}": flow(name, TEACHER_STEPS) for name in ("base", "fine_tune")}
    for steps in STEPS:
        found[f"fine_tune, {steps}"] = flow("fine_tune", steps)
        found[f"lora, {steps}"] = partial(stock, steps, samples)
        found[f"lora by us, {steps}"] = jumps("lora", steps)
        if whole:
            found[f"whole, {steps}"] = jumps("whole", steps)
    return found


def scores(samples: int, whole: bool) -> dict[str, Any]:
    """What the judges say of each; what was drawn before is kept."""
    judges, found = Judges(), {}
    for name, draw in drawers(samples, whole).items():
        kept = Path("scores") / f"{name}.json"
        if not kept.is_file():
            write_json(kept, judges(draw(), asked(samples)[2]))
        found[name] = json.loads(kept.read_text())
        print(name, found[name], flush=True)
    return {"held": judges.held, "scores": found}


def table(record: dict[str, Any]) -> str:
    """A line per network and number of steps."""
    told = {
        "base": "base, guided", "fine_tune": "fine-tune, guided", "lora": "**few-step LoRA, by stock diffusers**",
        "lora by us": "the same, by our sampler", "whole": "all weights as FACM",
    }  # fmt: skip
    lines = []
    for name, text in told.items():
        for steps in (*STEPS, TEACHER_STEPS):
            one = record["scores"].get(f"{name}, {steps}")
            if one is not None:
                calls = steps * (2 if "guided" in text else 1)
                shares = [f"{100 * one[key]:.1f}" for key in ("digit", "style")]
                lines.append([text, steps, calls, *shares, f"{one['fd']:.2f}"])
    header = ("network", "steps", "calls", "prompted digit, %", "thick strokes, %", "distance")
    held, about = record["held"], record["machine"]
    lengths = ", ".join(f"{name.replace('_', '-')} {steps}" for name, steps in record["steps"].items())
    minutes = ", ".join(f"{name.replace('_', '-')} {seconds / 60:.1f}" for name, seconds in record["seconds"].items())
    alone = "" if "whole" in record["steps"] else " --lora-only"
    caption = (
        f"{record['samples']:,} samples each, ten prompts; distance: Frechet, of pixels, to all thickened digits. The "
        f"judges read {100 * held['digit']:.1f} % of the held-out thick digits, and call {100 * held['style']:.1f} % "
        f"of them thick and {100 * held['style of plain ones']:.1f} % of the plain ones. {record['parameters']:,} "
        f"parameters, {record['lora_parameters']:,} in the LoRA of rank {RANK}; steps of training: {lengths}; minutes "
        f"of one core: {minutes}. `python benchmarks/lora_digits.py{alone}` on {about['cpu']}, torch {about['torch']}, "
        f"{about['date']}, commit {about['commit']}."
    )
    return f"{markdown(header, lines)}\n\n{caption}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps and samples; no record is written")
    parser.add_argument("--table", action="store_true", help="refresh the page from the record; run nothing")
    parser.add_argument("--only", choices=["flows", "lora", "whole"], help="one part of it, as a process of its own")
    parser.add_argument("--lora-only", action="store_true", help="without the student of all weights")
    arguments = parser.parse_args()
    if arguments.table:
        refresh(PAGE, NAME, table(json.loads((RESULTS / "lora_digits.json").read_text())))
        return
    folder = ROOT / "outputs" / ("lora_digits_quick" if arguments.quick else "lora_digits")
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    lengths, samples = (dict.fromkeys(LENGTHS, 3), 20) if arguments.quick else (LENGTHS, SAMPLES)
    if arguments.only in (None, "flows"):
        flows(lengths)
    students = ("lora",) if arguments.lora_only else ("lora", "whole")
    for name in students:
        if arguments.only in (None, name):
            student(name, lengths)
    if arguments.only is not None:
        return
    counts = {True: 0, False: 0}
    for name, parameter in load_model("outputs/train/lora").backbone.named_parameters():
        counts[is_adapter(name)] += parameter.numel()
    lasts = {
        name: Path("outputs/train") / name / "checkpoints" / "last.ckpt" for name in ("base", "fine_tune", *students)
    }
    record = {
        "machine": machine(), "samples": samples, **scores(samples, "whole" in students),
        "steps": {name: read_checkpoint(file)["flowanchor"]["step"] for name, file in lasts.items()},
        "parameters": counts[False], "lora_parameters": counts[True],
        "seconds": {name: float((Path("outputs/train") / name / "finished").read_text()) for name in lasts},
    }  # fmt: skip
    print(table(record))
    if not arguments.quick:
        write_json(RESULTS / "lora_digits.json", record)
        refresh(PAGE, NAME, table(record))


if __name__ == "__main__":
    main()
