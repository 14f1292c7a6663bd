"""What is made of results files: tables, pictures, a page and the marked sections of others."""
