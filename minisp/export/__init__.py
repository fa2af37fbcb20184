"""Writers for serving formats, one file per target."""
