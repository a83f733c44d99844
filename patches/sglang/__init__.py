"""SGLang, from 0.4.9.post2."""
