"""The front end: `DAVE`, its `Explanation`, and the ways from image files to results.

explainer     DAVE and effective_gradient
convergence   the error of a map at a finite number of samples
pipeline      `dave_fast.pipeline`: a photograph in, scored classes with maps out
image_files   the command `dave-fast explain`: many files, pictures and arrays out
"""
