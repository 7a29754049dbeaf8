"""`flowanchor-report`: any set of training runs in one table, with curves and a page to send around."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from flowanchor.errors import ConfigError
from flowanchor.programs.commands import report as main
from flowanchor.reporting.run_report import markdown, write_report
from flowanchor.reporting.runs import find_runs


def report(cfg: DictConfig) -> None:
    """Collect `runs` and write the report into Hydra's output folder."""
    if not cfg.runs:
        raise ConfigError("Which runs? Add runs=FOLDER, for example runs=outputs/multirun/NAME.")
    if OmegaConf.is_dict(cfg.runs):
        raise ConfigError("runs= is a folder, or a list of folders: write runs=[FOLDER,FOLDER].")
    folders = list(cfg.runs) if OmegaConf.is_list(cfg.runs) else [cfg.runs]
    folder = Path(HydraConfig.get().runtime.output_dir)
    rows = write_report(find_runs(folders), folder, cfg.title or "Runs in " + ", ".join(map(str, folders)))
    print(markdown(rows))
    print(f"report.html, table.json, table.md and the figures are in {folder}")


if __name__ == "__main__":
    main()
