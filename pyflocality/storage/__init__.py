"""Images as they are stored: mapped files, augmented copies, and the cache folder."""
