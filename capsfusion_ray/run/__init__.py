"""One run of the fuse job, from the survey to the manifest. Ray lives here."""
