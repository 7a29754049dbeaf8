"""Entry points: each module composes a configuration, builds from it, and runs."""

from flowanchor.base.start import begin

begin()
