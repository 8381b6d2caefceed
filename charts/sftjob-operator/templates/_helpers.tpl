{{- define "sftjob.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "sftjob.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sftjob.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "sftjob.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: sftjob
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "sftjob.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "sftjob.trainerImage" -}}
{{- .Values.trainer.image | default (printf "ghcr.io/sftjob/sft-trainer:%s" .Chart.AppVersion) }}
{{- end }}

{{/* "true" where this release installs the policy that puts pods into their PodGroup, else nothing. */}}
{{- define "sftjob.installsGangPolicy" -}}
{{- $asked := toString .Values.gang.native.admissionPolicy }}
{{- $served := .Capabilities.APIVersions.Has "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy" }}
{{- if or (eq $asked "true") (and (eq $asked "auto") $served) }}true{{ end }}
{{- end }}

{{/* What the operator is told. Where it has no right to look for the policy itself, auto is answered here. */}}
{{- define "sftjob.nativeGang" -}}
{{- $asked := toString .Values.gang.native.enabled }}
{{- if and (eq $asked "auto") .Values.watchNamespaces }}
{{- include "sftjob.installsGangPolicy" . | default "false" }}
{{- else }}
{{- $asked }}
{{- end }}
{{- end }}

{{/* What the operator may do where it watches: no more than it does. */}}
{{- define "sftjob.rules" -}}
- apiGroups: [sftjob.dev]
  resources: [sftjobs]
  verbs: [get, list, watch]
- apiGroups: [sftjob.dev]
  resources: [sftjobs/status]
  verbs: [get, patch, update]
# Owner references that block deletion ask for it where OwnerReferencesPermissionEnforcement is on, as on OpenShift.
- apiGroups: [sftjob.dev]
  resources: [sftjobs/finalizers]
  verbs: [update]
- apiGroups: [kubeflow.org]
  resources: [pytorchjobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [scheduling.k8s.io]
  resources: [podgroups]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, patch, delete]
# Deleted are only pods that a dead node can no longer end.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, delete]
- apiGroups: [""]
  resources: [pods/log]
  verbs: [get]
# Written about SFTJobs; read where a pod was refused and nothing else tells why.
- apiGroups: [""]
  resources: [events]
  verbs: [get, list, create, patch]
{{- end }}
