"""Attribution maps of whole datasets, in runs that can be killed and resumed.

    source     a folder, list, manifest, tar or Hugging Face dataset -> records (id, uri, target, seed);
      │        records whose id is already in a committed shard are left out, which is how a run resumes
      ▼  decode     on threads of the worker, ahead of the device
      │  mapper     a batch of images -> rows; the only module that calls the explainer
      ▼  shards     rows -> Parquet files, each written whole or not at all

A worker is a process with one device that decodes, explains and writes (`worker`). The local runner (`local`) starts
one worker a device; the Ray runner (`ray_engine`) spreads the same steps over a cluster. A run's folder holds
`run.json` (the run's identity, see `identity`) and the shards; there is no other record of what is done.

`reader` opens the maps, and `export` writes them in forms that other programs open.
"""

from __future__ import annotations
