"""Models by name: from a name to an nn.Module in evaluation mode, its class names and its fingerprint.

spec          the names: timm's, `hf:…`, `torchvision:…`, `open_clip:…`, `module:function`
catalog       `load_model`, and the tuned noise_alpha of a model
from_*        a loader for each library
adapter       models of other libraries as functions of images
huggingface_* modules of transformers as functions of images, their processors, files, and adapters of peft
hub           the network, and errors of other libraries
weights_file  weights from files; `checkpoint` finds them in what training scripts save
meaning       what an output means: classes or an embedding, and their probabilities
labels        class names
fingerprint   whether a model has been changed
demo/         the embedded model and its scenes
"""
