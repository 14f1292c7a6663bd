"""The published tables and figures again, from our own runs on any set of images.

    pyflocality reproduce SOURCE --network A --network B --out DIR
    python -m benchmarks.reproduce.denoising --source TRAIN --test TEST --network A --out FILE.json
    python -m benchmarks.reproduce.fields --source TRAIN --network A --out FILE.json
    python -m benchmarks.reproduce.sweeps --source TRAIN --network A --out FILE.json

**Comparison.** Every model and every network starts from the same noise x_T and runs on its own:
DDPM's schedule, ten DDIM steps at t = 900, 800, .., 0, x0 clipped to [-1, 1] where a step uses it.
At each step u, the clipped x0 of the model's run, is held against y, the clipped x0 of the
network's run at the same step: MSE = sum (u - y)^2 / D and r2 = 1 - MSE / var(y) of each image,
averaged over the images. The x0 of the last step is the image itself, so its figures are those
"at the end"; standard errors are over the images. Runs part from each other: a difference late in
a run has the earlier ones in it.

The images are taken in a random order: the batch mean of the published code depends on it, and
folders and zips come class by class.

References:
    Lukoianov, Yuan, Solomon and Sitzmann, Locality in image diffusion models emerges from data
    statistics, 2025 (table 1, figures 1, 2 and 5).
"""
