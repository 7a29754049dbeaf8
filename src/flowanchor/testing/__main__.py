"""`python -m flowanchor.testing backbone=mlp backbone.depth=2`: a backbone's rules, one line each."""

from __future__ import annotations

import sys
import warnings

from hydra import compose, initialize_config_module

from flowanchor import __version__
from flowanchor.base.typed import instantiate
from flowanchor.interfaces import Backbone
from flowanchor.programs.launch import LIBRARY_WARNINGS, prepare
from flowanchor.programs.messages import explain
from flowanchor.programs.texts import quoted
from flowanchor.testing.backbone import examine_backbone


def main() -> None:
    """Settings as of train.py; exits with 1 where a rule is broken."""
    prepare()
    words = quoted([word for word in sys.argv[1:] if word != "debug=true"])
    for message in LIBRARY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if words == ["--version"]:
        print(f"flowanchor {__version__}")
        sys.exit(0)
    if not words or words[0] in ("-h", "--help"):
        print("python -m flowanchor.testing backbone=NAME [backbone.KEY=VALUE data=... ...]: settings as of train.py")
        sys.exit(0)
    try:
        with initialize_config_module("flowanchor.conf", version_base="1.3"):
            network = instantiate(compose("train", words).backbone)
    except Exception as error:
        sentence = None if "debug=true" in sys.argv else explain(error, "train", "pkg://flowanchor.conf", words)
        if sentence is None:
            raise
        print(f"Error: {sentence}", file=sys.stderr)
        sys.exit(1)
    if not isinstance(network, Backbone):
        print(f"Error: {type(network).__name__} is no Backbone (flowanchor.interfaces).", file=sys.stderr)
        sys.exit(1)
    findings = examine_backbone(network)
    for finding in findings:
        verdict = "BROKEN" if finding.fault else "not looked at" if finding.skipped else "kept"
        remark = finding.fault or finding.skipped
        print(f"{verdict:14}{finding.rule}{f': {remark}' if remark else ''}")
    sys.exit(any(finding.fault for finding in findings))


if __name__ == "__main__":
    main()
