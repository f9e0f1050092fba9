"""Attribution maps for whole datasets: runs that finish, whatever befalls them.

    source     folder, list, manifest, tars, Hugging Face dataset -> records (id, uri, target, seed)
      │        those whose ids stand in a committed shard are left out: this is all there is to resuming
      ▼  decode     on threads of the worker, ahead of the device
      │  mapper     a batch of images -> rows; the one place where a run meets the explainer
      ▼  shards     rows -> Parquet files that are whole or not there

A *worker* is a process with one device that decodes, explains and writes (`worker`). The local engine (`local`) feeds
one a device; the Ray engine (`ray_engine`) spreads the same steps over a cluster. A run's folder holds `run.json`
(what makes the maps: see `identity`) and shards, and nothing else is true about it: what is done is what the shards
hold.
"""

from __future__ import annotations
