{{- define "tita.jobs.serviceName" -}}
{{- printf "%s-jobs" (include "tita.fullname" .) -}}
{{- end -}}

{{- define "tita.inference.name" -}}
{{- printf "%s-inference" (include "tita.fullname" .) -}}
{{- end -}}

{{/* What the benchmark asks unless its recipe says otherwise: this release's inference Service,
with weight 0 and with the release's weight. */}}
{{- define "tita.benchmark.recipe" -}}
{{- if .Values.inference.enabled -}}
{{- $url := printf "http://%s:%v/v1" (include "tita.inference.name" .) .Values.inference.service.port -}}
{{- dict "base_url" $url "model" .Values.inference.modelName "weights" (list 0.0 .Values.inference.weight) | toJson -}}
{{- else -}}
{}
{{- end -}}
{{- end -}}

{{- define "tita.apiKeysEnv" -}}
{{- with .Values.inference.auth.existingSecret -}}
- name: TITA_API_KEYS
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.inference.auth.secretKey }}
{{- end -}}
{{- end -}}

{{/* Where a replica keeps downloaded models: a claim, or the node's disk. */}}
{{- define "tita.inference.cache" -}}
{{- $cache := .Values.inference.cache -}}
{{- if $cache.persistence.enabled -}}
persistentVolumeClaim:
  claimName: {{ default (printf "%s-cache" (include "tita.inference.name" .)) $cache.persistence.existingClaim }}
{{- else -}}
{{- include "tita.volumeSource" $cache -}}
{{- end -}}
{{- end -}}
