"""Models by name: from a spec to an nn.Module in evaluation mode, its labels and its fingerprint.

spec, catalog     `timm/…`, `hf:…`, `torchvision:…`, `open_clip:…`, `bcos:…`, `module:function`
from_*            one loader a library
adapter, hub, weights_file, labels, fingerprint
demo/             the embedded model and its scenes
"""
