exec python docs/recipes/openai_client.py
