"""Benchmarks of nmjax: scripts, and the GPU session `benchmarks.gpu`."""
