"""A page on this machine to draw with a model, and to watch a run that trains: `flowanchor play` (docs/play.md).

What draws and what reads a run's folder stands in plain functions here; only `page.py` knows gradio, an optional
package (`pip install "flowanchor[play]"`).
"""
