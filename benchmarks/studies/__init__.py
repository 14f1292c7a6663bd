"""Experiments of the papers on our own terms: each writes a JSON file and a picture beside it.

python -m benchmarks.studies NAME --out FILE.json [--mnist ZIP] [--cifar10 ZIP] [--quick]
"""
