# CPU image of the server: docker build -t ecar . && docker run -p 8000:8000 -e ECAR_API_KEYS=... ecar
# For a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN useradd --create-home --uid 10001 ecar && pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.9"
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir ".[serve]"
USER 10001
ENV HF_HUB_DISABLE_TELEMETRY=1
EXPOSE 8000
# exec form: SIGTERM reaches the server, which drains.
ENTRYPOINT ["ecar", "serve", "--host", "0.0.0.0"]
CMD ["fashion"]
