"""Everything that is to be measured on one GPU, in stages: ``python -m experiments.bench.gpu``. See docs/gpu.md."""
