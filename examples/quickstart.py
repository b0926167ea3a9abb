"""A model, and text from it.

python examples/quickstart.py
"""

import jllama

lm = jllama.LM.load(jllama.DEMO)  # any checkpoint's path; dtype="bfloat16", quant="int8" and more
print(lm.generate("Once upon a time,", max_new_tokens=64, temperature=0.8, seed=7).text)
for text in lm.stream("One day, Lily", max_new_tokens=32):
    print(text, end="", flush=True)
print("\nlog-probability:", lm.score("The cat sat on the mat.").total)
