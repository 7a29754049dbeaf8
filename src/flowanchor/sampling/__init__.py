"""Samplers (`sampler=`), noise that belongs to a sample, and streamed generation."""

from flowanchor.sampling.consistency import ConsistencySampler
from flowanchor.sampling.flow import FlowSampler
from flowanchor.sampling.generate import build_sampler, generate
from flowanchor.sampling.meanflow import MeanFlowSampler

__all__ = ["ConsistencySampler", "FlowSampler", "MeanFlowSampler", "build_sampler", "generate"]
