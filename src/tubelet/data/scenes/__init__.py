"""Generated videos with sound that come with captions, questions and answers: see `tubelet.data.scenes.generate`."""
