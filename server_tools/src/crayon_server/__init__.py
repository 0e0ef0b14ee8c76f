"""The server's side of Crayon: models, training, and the benchmark that they are judged on."""
