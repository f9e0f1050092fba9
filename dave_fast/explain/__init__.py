"""The front end: `DAVE`, its `Explanation`, and the way from image files to results.

explainer     DAVE and effective_gradient
depth         the names of depths: pixels, blocks, shares of the depth
depth_account what of a decision each depth accounts for, as numbers, words and a figure
sample_calls  the part of DAVE for callers that fill micro-batches themselves
explanation   the result of DAVE.explain
pictures      its pictures
view          what a model was shown of an image
inputs        photographs and tensors -> the images of a call
route_cache   the routes through a model, by size of images
subject       a model with its preprocessing and class names
convergence   the error of a map at a finite number of samples
pipeline      `dave_fast.pipeline`: a photograph in, scored classes with maps out
image_files   the work of `dave-fast explain`: image files in, pictures and arrays out
result_names  the names of an image's result files
arrays        the .npz file of an explained image
"""
