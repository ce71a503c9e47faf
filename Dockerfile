# nanochat serve on a CPU, without torch. The model is a folder that `nanochat export` wrote:
#   nanochat export photos exported/photos
#   docker build --build-arg MODEL=exported/photos -t nanochat .
#   docker run --rm -p 127.0.0.1:8000:8000 -e NANOCHAT_API_KEY=$(openssl rand -hex 16) nanochat
# dev/check_dockerfile.py runs these steps in a clean folder, without Docker.
FROM python:3.12-slim

ARG MODEL=exported/photos
RUN useradd --create-home nanochat
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY nanochat nanochat
RUN pip install --no-cache-dir -c constraints.txt '.[serve]'
COPY ${MODEL} /model
USER nanochat
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
CMD ["nanochat", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
