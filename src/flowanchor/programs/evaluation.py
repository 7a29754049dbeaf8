"""One checkpoint under one metric: generates, looks, and goes on where an earlier run stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from flowanchor.checkpoints import LoadedModel
from flowanchor.errors import DataError
from flowanchor.generation.generator import Generator
from flowanchor.generation.sample_file import SampleFile
from flowanchor.generation.samplers import network_calls, sampler_settings
from flowanchor.interfaces import Sampler
from flowanchor.metrics.collected import Collected, Range, Wanted, remaining, share
from flowanchor.metrics.evaluator import Evaluator, Scores
from flowanchor.metrics.partial_results import PartialResults, merge
from flowanchor.programs.processes import Processes
from flowanchor.request import Request


@dataclass(frozen=True)
class Draw:
    """A set of samples: by which sampler, from which noise, of what."""

    sampler: Sampler
    seed: int
    repeat: int
    request: Request

    @property
    def name(self) -> str:
        """Names the files of one set."""
        return line_name(self.sampler) + (f"-r{self.repeat}" if self.repeat else "")


@dataclass
class Evaluation:
    """What all lines of a report share."""

    cfg: DictConfig
    model: LoadedModel
    generator: Generator
    requests: list[Request]  # one for each independent set
    evaluator: Evaluator
    processes: Processes
    store: PartialResults
    folder: Path
    console: Console
    floor_n: int | None
    floor: Scores | None = None  # known to the first process

    def __post_init__(self) -> None:
        self.wanted: Wanted = self.evaluator.wanted(self.cfg.num_samples, self.floor_n)

    def finished(self, draw: Draw) -> dict[str, Any] | None:
        """The line of an earlier run, where it is still whole."""
        line = self.store.line(draw.name)
        return None if self.cfg.save_samples and not self._sample_path(draw).is_file() else line

    def generate(self, draw: Draw, on_images: Callable[[int, int], None]) -> None:
        """This process' share of the images that are missing, into `store`.

        `on_images` is called with (images of this process' share so far, all of them).
        """
        cfg, name = self.cfg, draw.name
        file = self._sample_file(draw)
        if self.processes.first and file is not None and not file.draft.is_file():
            self.store.forget(name)  # the images of what was collected are gone
        self.processes.wait()
        parts = self.store.parts(name, self.wanted)
        todo = remaining(self.wanted.n, [r for part in parts for r in part.ranges])
        if parts:
            done = sum(part.n for part in parts)
            self.console.print(f"{name}: going on, {done:,} of {self.wanted.n:,} images are measured already")
        mine = merge(parts[self.processes.index :: self.processes.count], self.wanted)
        self.processes.wait()  # before anyone replaces a part
        own = share(todo, cfg.batch_size, self.processes.index, self.processes.count)
        total = mine.n + sum(stop - start for start, stop in own)
        saved = mine.n
        on_images(mine.n, total)
        for start, stop in own:
            for chunk, first in self._chunks(draw, (start, stop), mine):
                if file is not None:
                    file.write(first, chunk)
                texts = draw.request.texts(first, first + len(chunk))
                mine.add(first, self.evaluator.look(chunk.permute(0, 3, 1, 2), texts))
                on_images(mine.n, total)
                if mine.n - saved >= cfg.save_every:
                    self._save(name, mine, file)
                    saved = mine.n
        self._save(name, mine, file)
        if file is not None:
            file.close()
        self.processes.wait()

    def score(self, draw: Draw) -> dict[str, Any]:
        """The line of one set, once every process has generated its share; by the first process."""
        cfg, model, name, sampler = self.cfg, self.model, draw.name, draw.sampler
        found = self.store.merged(name, self.wanted)
        missing = remaining(self.wanted.n, found.ranges)
        if missing:
            raise DataError(
                f"Images {missing[0][0]} ... {missing[0][1] - 1} of NFE {sampler.nfe} are in no file below "
                f"{self.store.folder}: all processes must share the run folder; run the same command again."
            )
        scores = self.evaluator.score_collected(found)
        line = {
            "sampler": sampler.label,
            "nfe": sampler.nfe,
            "network_calls": network_calls(sampler, model.backbone),
            **scores.as_dict(),
            "fd_at_floor_n": None if self.floor_n is None else self.evaluator.frechet_of_prefix(found),
            "floor": None if self.floor is None else self.floor.fd,
            "floor_n": self.floor_n,
            "protocol": cfg.protocol,
            "seed": draw.seed,
            "ema": model.ema,
            "checkpoint_hash": model.digest,
            "seconds": found.seconds,  # of generation, summed over processes
        }
        file = self._sample_file(draw)
        if file is not None:
            file.finish()
        self.store.finish(name, line)
        return line

    def settings(self) -> dict[str, Any]:
        """What all lines of the report have in common."""
        cfg, model, reference = self.cfg, self.model, self.evaluator.reference
        source = self.evaluator.source
        return {
            "checkpoint": str(Path(model.path).resolve()),
            "checkpoint_hash": model.digest,
            **({"sources": model.sources} if model.sources else {}),
            "step": model.step,
            "ema": model.ema,
            "kind": model.kind,
            "data": source.name if self.evaluator.data is None else self.evaluator.data.name,
            "metric": self.evaluator.label,
            "metric_settings": OmegaConf.to_container(cfg.metric, resolve=True),
            "extractor": {"name": self.evaluator.extractor_name, "digest": self.evaluator.extractor_digest[:12]},
            "reference": {
                "name": source.name,
                "hash": source.digest[:12],
                "n": reference.n,
                "split": "train" if cfg.reference is None else None,
                "missing": reference.missing(self.evaluator.metric.spatial_layer),
            },
            "sampler": sampler_settings(cfg.sampler, model),
            "num_samples": cfg.num_samples,
            "protocol": cfg.protocol,
            "prompts": self._prompts(),
            "dtype": cfg.dtype or "float32",
            "seed": cfg.seed,
            "repeats": cfg.repeats,
            "batch_size": cfg.batch_size,
        }

    def _prompts(self) -> dict[str, Any] | None:
        request = self.requests[0]
        listed = request.names()
        if not listed:
            return None
        content = hashlib.sha256("\n".join(listed).encode()).hexdigest()
        used = min(len(listed), request.n)
        return {"file": str(Path(self.cfg.prompts)), "n": used, "hash": content[:12], "negative": self.cfg.negative}

    def _chunks(self, draw: Draw, part: Range, timed: Collected) -> Iterator[tuple[Tensor, int]]:
        """Images of a range, uint8 [b, H, W, C], each chunk with its first index; raises `DataError` for a NaN."""
        (first, stop), cfg = part, self.cfg
        generator = replace(self.generator, sampler=draw.sampler)
        chunks = generator.draw(draw.request.part(first, stop), draw.seed, cfg.batch_size, cfg.size, first)
        while first < stop:
            started = perf_counter()
            chunk = next(chunks)
            timed.seconds += perf_counter() - started
            yield chunk, first
            first += len(chunk)

    def _save(self, name: str, mine: Collected, file: SampleFile | None) -> None:
        if file is not None:
            file.flush()  # first: what is recorded must be there
        self.store.save(name, self.processes.index, mine)

    def _sample_path(self, draw: Draw) -> Path:
        repeat = f"-r{draw.repeat}" if draw.repeat else ""
        return self.folder / "samples" / f"nfe{draw.sampler.nfe or draw.sampler.label}{repeat}.npz"

    def _sample_file(self, draw: Draw) -> SampleFile | None:
        if not self.cfg.save_samples:
            return None
        return SampleFile(self._sample_path(draw), self.cfg.num_samples, draw.request.numbers())


def line_name(sampler: Sampler) -> str:
    """Names the files of one line of the report."""
    return f"{sampler.label}-nfe{sampler.nfe}"
