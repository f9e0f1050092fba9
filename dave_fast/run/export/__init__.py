"""The maps of a run in forms that other programs open.

    forms          the table of forms, and the checks before one is written
    job            what all forms share: writing whole, photographs that are read again, JSON written line by line
    names          ids -> names of files
    arrays         Zarr, .npy
    virelay        ViRelAy's HDF5
    pictures       PNG; PNG with JSON
    coco, regions  evidence regions as COCO annotations, in the pixels of the photographs
    tensorboard    TensorBoard's event files
    gallery        a page in a folder: gallery.html, gallery.css, gallery.js

Every form is written under a temporary name and renamed when it is complete.
"""

from dave_fast.run.export.forms import FORMS, Form, export, form_of

__all__ = ["FORMS", "Form", "export", "form_of"]
