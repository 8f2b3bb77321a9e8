"""Compiled forwards of plain Llamas on a CPU."""
