"""Samplers (`sampler=`), noise that belongs to a sample, and streamed generation."""

from flowanchor.sampling.consistency import ConsistencySampler
from flowanchor.sampling.flow import FlowSampler
from flowanchor.sampling.generate import build_sampler, generate

__all__ = ["ConsistencySampler", "FlowSampler", "build_sampler", "generate"]
