"""Programs that run an exported model in its own engine; each is started as a process of its own, with the model, a question and where the answer goes (see ``engine``)."""
