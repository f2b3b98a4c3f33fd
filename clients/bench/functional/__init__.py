"""Benchmarks of code that has to run: HumanEval, MBPP and ClassEval, by one driver."""
