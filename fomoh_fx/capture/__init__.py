"""Capture: a model or function becomes a functional ATen graph with parameters and buffers as inputs."""

from fomoh_fx.capture.attempts import capture
from fomoh_fx.capture.call import Call
from fomoh_fx.capture.program import Input, Output, Program

__all__ = ["Call", "Input", "Output", "Program", "capture"]
