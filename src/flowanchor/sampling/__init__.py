"""Samplers (`sampler=`), and noise that belongs to a sample."""

from flowanchor.sampling.consistency import ConsistencySampler
from flowanchor.sampling.flow import FlowSampler
from flowanchor.sampling.meanflow import MeanFlowSampler

__all__ = ["ConsistencySampler", "FlowSampler", "MeanFlowSampler"]
