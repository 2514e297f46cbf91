"""An index of videos: what each file is, in a Parquet file that `data.datasets` reads. See `app.index`."""
